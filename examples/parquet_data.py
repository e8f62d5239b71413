"""Write examples/data/digits.parquet: scikit-learn's handwritten digits as a table, for examples/parquet.yaml.

python examples/parquet_data.py
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

ROWS_PER_GROUP = 90


def main(path: Path) -> None:
    """A column of 64 pixels, as a list, and one of the digit."""
    pixels, labels = load_digits(return_X_y=True)
    images = pa.FixedSizeListArray.from_arrays(pa.array((pixels / 16).astype("float32").ravel()), 64)
    table = pa.table({"pixels": images, "digit": pa.array(labels, pa.int64())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=ROWS_PER_GROUP)
    print(f"{path}: {table.num_rows} rows in {-(-table.num_rows // ROWS_PER_GROUP)} row groups")


if __name__ == "__main__":
    main(Path(__file__).parent / "data" / "digits.parquet")
