#!/bin/bash
# safetensors 0.8.0, scipy 1.17.1, numpy 2.4.6 (upstream: issue 825 on arrays in Fortran order, open when this was written)
#
# Behaviour: an orthogonal rotation made by scipy.linalg.qr (a basis for a distributed alignment search,
# say) and saved with safetensors.numpy comes back as its transpose, that is as its inverse. numpy.linalg.qr
# of the same matrix survives.
#
# Why it is surprising: safetensors.numpy 0.8 writes the array's memory as it lies and its logical shape.
# SciPy's qr, svd, eigh and orth return arrays in Fortran order, NumPy's return C order, so two functions
# of one name differ in what reaches the disk. For a square orthogonal matrix no check helps: the shape
# and dtype are right, R Rt is the identity, the rows and columns have length one; only "rotate, edit,
# rotate back" now edits another subspace. For a tall basis (scipy.linalg.orth) the values are shuffled.
# safetensors.torch refuses such tensors; the numpy functions neither refuse nor warn. 0.7.0 was right.
#
# Seen: qr: equal to what was saved False, equal to its transpose True, orthogonal to within 1e-5 True
#       energy of a vector of the first 4 directions found in those 4 after loading: 0.075 instead of 1
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$tmp/lib" safetensors==0.8.0 scipy==1.17.1 numpy==2.4.6
cd "$tmp"
cat > show.py <<'PY'
import numpy as np
import scipy.linalg
from safetensors.numpy import load_file, save_file

square = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
rotation = scipy.linalg.qr(square)[0]
same = np.linalg.qr(square)[0]
basis = scipy.linalg.orth(square[:, :4])
save_file({"rotation": rotation, "same": same, "basis": basis}, "das.safetensors")
back = load_file("das.safetensors")
r = back["rotation"]
vector = rotation[:, :4] @ np.array([0.1, -0.7, 0.5, 0.5], dtype=np.float32)
energy = float(np.square(vector @ r[:, :4]).sum() / np.square(vector).sum())
print("saved", np.array_equal(r, rotation), "transpose", np.array_equal(r, rotation.T), "energy", round(energy, 3))
print("orthogonal", np.allclose(r @ r.T, np.eye(64), atol=1e-5), "numpy's own", np.array_equal(back["same"], same))
print("tall basis", np.array_equal(back["basis"], basis), back["basis"].shape == basis.shape)
assert np.allclose(rotation, same, atol=1e-4)
assert not np.array_equal(r, rotation) and np.array_equal(r, rotation.T)
assert r.shape == rotation.shape and r.dtype == rotation.dtype and np.allclose(r @ r.T, np.eye(64), atol=1e-5)
assert energy < 0.5 and np.array_equal(back["same"], same)
assert not np.array_equal(back["basis"], basis) and back["basis"].shape == basis.shape
PY
PYTHONPATH=$tmp/lib python3 show.py
