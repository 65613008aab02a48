#!/bin/bash
# pyarrow 26.0.1
#
# Behaviour: in a Parquet file of latent activations (zeros, a few firings, one NaN), whether a filter
# finds the NaN depends on how long the row groups are. With one row group `is_nan(act)` finds the row.
# With row groups of 100 the same filter finds nothing, and so do `act != act` and `~is_finite(act)`.
# No filter raises or warns.
#
# Why it is surprising: row-group statistics leave NaN out. A stretch where a latent is silent holds
# only zeros besides the NaN, so its minimum and maximum are both 0; the reader takes that as "act is 0
# in every row here", works the filter out to false and never looks at the rows. Sparse activations are
# just the columns with such stretches, and "is there a NaN anywhere" is the check one runs on them.
# The same columns go wrong without a constant stretch: `~(act <= 5)` keeps the NaN in memory and loses
# it in the small groups, and `count_rows(act >= 0)` counts the NaN (1000), whatever the groups, while
# reading with the filter and counting gives 999.
#
# Seen:
#   row groups of 1000: is_nan 1, act != act 1, not finite 1, not(act <= 5) 51; act >= 0: read 999, counted 1000
#   row groups of  100: is_nan 0, act != act 0, not finite 0, not(act <= 5) 50; act >= 0: read 999, counted 1000
#   in memory:          is_nan 1, act != act 1, not finite 1, not(act <= 5) 51; act >= 0: 999
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$tmp/lib" pyarrow==26.0.1
cd "$tmp"
cat > show.py <<'PY'
import math

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

act = [0.0] * 1000
act[250] = math.nan
act[900:950] = [9 + i / 100 for i in range(50)]
table = pa.table({"token": list(range(1000)), "act": act})
field = pc.field("act")
filters = {
    "is_nan": pc.is_nan(field),
    "act != act": field != field,
    "not finite": ~pc.is_finite(field),
    "not(act <= 5)": ~(field <= 5),
    "act >= 0": field >= 0,
}
memory = {name: table.filter(f).num_rows for name, f in filters.items()}
seen = {}
for size in (1000, 100):
    pq.write_table(table, f"{size}.parquet", row_group_size=size)
    seen[size] = {name: pq.read_table(f"{size}.parquet", filters=f).num_rows for name, f in filters.items()}
    seen[size]["counted"] = ds.dataset(f"{size}.parquet").count_rows(filter=filters["act >= 0"])
print("in memory", memory)
print("row groups", seen)
assert memory == {"is_nan": 1, "act != act": 1, "not finite": 1, "not(act <= 5)": 51, "act >= 0": 999}
assert seen[1000] == {**memory, "counted": 1000}
assert seen[100] == {"is_nan": 0, "act != act": 0, "not finite": 0, "not(act <= 5)": 50, "act >= 0": 999, "counted": 1000}
PY
PYTHONPATH=$tmp/lib python3 show.py
