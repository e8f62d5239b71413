"""Columns of tables: of which types they are, and the numbers that are made of their values, or refused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from starling.algorithms.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

# --- types ------------------------------------------------------------------------------------------------------------


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without its encoding: of categories (a dictionary) their values."""
    kind = plain_type(column.type)
    return column if column.type == kind or is_listed(kind) else column.cast(kind)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values, whatever encodes them: files of one table may differ in that."""
    import pyarrow as pa

    inner = cast("Any", kind)
    if pa.types.is_dictionary(kind):
        return plain_type(inner.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if is_listed(kind):
        value = plain_type(inner.value_type)
        return pa.list_(value, inner.list_size) if pa.types.is_fixed_size_list(kind) else pa.list_(value)
    return kind


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds texts, or categories that are texts."""
    import pyarrow as pa

    return pa.types.is_string(plain_type(kind))


def is_whole(kind: pa.DataType) -> bool:
    """Whether a column holds whole numbers or truth values."""
    from pyarrow import types

    kind = plain_type(kind)
    return types.is_integer(kind) or types.is_boolean(kind) or (types.is_decimal(kind) and cast("Any", kind).scale <= 0)


def is_number(kind: pa.DataType) -> bool:
    """Whether a column holds numbers or truth values."""
    from pyarrow import types

    kind = plain_type(kind)
    return is_whole(kind) or types.is_floating(kind) or types.is_decimal(kind)


def is_listed(kind: pa.DataType) -> bool:
    """Whether a column holds lists."""
    from pyarrow import types

    listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return listed or types.is_list_view(kind) or types.is_large_list_view(kind)


def is_feature(kind: pa.DataType) -> bool:
    """Whether a column holds numbers, or lists of numbers."""
    return is_number(cast("Any", kind).value_type if is_listed(kind) else kind)


# --- values -----------------------------------------------------------------------------------------------------------


def numbers_of(column: pa.ChunkedArray, name: str, place: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A column of numbers as an array of ``dtype``, shape (n,), or (n, k) if its values are lists of k numbers.

    Raises:
        DataError: there are nulls, lists of different lengths, or values that are not finite or that ``dtype`` does
            not hold.
    """
    import pyarrow as pa
    import pyarrow.compute

    compute: Any = pyarrow.compute
    if column.null_count:
        raise DataError(f"{place}: column {name} has {column.null_count} nulls; fill them, or leave those rows out")
    array: Any = plain(column).combine_chunks()
    num_rows, listed = len(array), is_listed(array.type)
    if listed:
        if len(compute.list_value_length(array).unique()) > 1:
            raise DataError(f"{place}: the lists of column {name} have different lengths; features must have one shape")
        array = array.flatten()
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if not len(array):
            raise DataError(f"{place}: the lists of column {name} are empty; leave the column out of task.features")
    if array.null_count:
        raise DataError(f"{place}: column {name} has nulls in its lists")
    where = f"{place}: column {name}"
    values = _whole(array, where) if np.issubdtype(dtype, np.integer) else _rounded(array, where, dtype)
    return values.reshape(num_rows, -1) if listed else values


def _whole(array: Any, where: str) -> NDArray[np.int64]:  # noqa: ANN401 - a pyarrow array
    import pyarrow as pa

    try:
        return array.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where} has values that are no whole numbers of 64 bits: {error}") from None


def _rounded(array: Any, where: str, dtype: np.dtype[Any]) -> NDArray[Any]:  # noqa: ANN401 - as above
    """Floating-point numbers: fractions are rounded, but no whole number becomes another, and none infinite."""
    import pyarrow as pa

    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    given: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        values = given.astype(dtype, copy=False)
    finite = np.isfinite(values)
    if not finite.all():
        wrong = given[~finite]
        what = f"{where} has {_shown(wrong[0])} ({len(wrong)} of {len(given)} values)"
        if np.isfinite(wrong).any():
            raise DataError(f"{what}, which is too large for {dtype}; scale the column, or leave it out")
        raise DataError(f"{what}; fill or leave out rows whose values are not finite, or leave out the column")
    if np.issubdtype(given.dtype, np.integer) and given.dtype.itemsize > 2:
        _check_exact(given, values, where)
    return values


def _check_exact(given: NDArray[Any], values: NDArray[Any], where: str) -> None:
    limit = 2 ** (np.finfo(values.dtype).nmant + 1)
    large = (given > limit) | (given < -limit) if given.dtype.kind == "i" else given > limit
    if not large.any():
        return
    given, back = given[large], values[large].astype(np.float64)
    info = np.iinfo(given.dtype)
    inside = (back >= float(info.min)) & (back < float(info.max))  # float(max) is max + 1 where that is not exact
    same = inside & (np.where(inside, back, 0).astype(given.dtype) == given)
    if not same.all():
        wrong = given[~same][0]
        raise DataError(
            f"{where} has {wrong}, which {values.dtype} cannot tell from {int(back[~same][0])}; leave the column out "
            "of task.features if it names something, or write it as floats if such a difference does not matter"
        )


def _shown(value: Any) -> str:  # noqa: ANN401 - a number of numpy
    return "NaN" if value != value else f"{value:g}"  # noqa: PLR0124 - NaN is not itself


# --- groups -----------------------------------------------------------------------------------------------------------


def codes_of(values: pa.ChunkedArray, name: str) -> tuple[NDArray[np.int64], int]:
    """Number the different values from 0 in their order; of how many rows there is none. These come last.

    Raises:
        DataError: values of that type have no order.
    """
    import pyarrow as pa
    import pyarrow.compute

    compute: Any = pyarrow.compute
    try:
        encoded: Any = plain(values).dictionary_encode().unify_dictionaries().combine_chunks()
        order = compute.array_sort_indices(encoded.dictionary).to_numpy()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise DataError(f"data.partition.column: samples cannot be divided by {name}, which is {values.type}") from None
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    missing = encoded.indices.is_null().to_numpy(zero_copy_only=False)
    places = encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)
    codes = np.where(missing, len(order), rank[places] if len(rank) else 0)
    return codes, int(missing.sum())


def is_finite(value: Any) -> bool:  # noqa: ANN401 - whatever a table holds
    """Whether a value of a table, or each of a list of them, is no NaN or infinity; what is no number is."""
    if isinstance(value, list | tuple):
        return all(map(is_finite, cast("list[Any]", value)))
    return not isinstance(value, float) or math.isfinite(value)
