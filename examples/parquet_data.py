"""Write examples/data/digits.parquet: scikit-learn's handwritten digits as a table, for examples/parquet.yaml.

python examples/parquet_data.py
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

pixels, labels = load_digits(return_X_y=True)
table = pa.table(
    {
        "pixels": pa.FixedSizeListArray.from_arrays(pa.array((pixels / 16).astype("float32").ravel()), 64),
        "digit": pa.array(labels, pa.int64()),
    }
)
path = Path(__file__).parent / "data" / "digits.parquet"
path.parent.mkdir(exist_ok=True)
pq.write_table(table, path, row_group_size=90)
print(f"{path}: {table.num_rows} rows in {-(-table.num_rows // 90)} row groups")
