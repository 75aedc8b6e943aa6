#!/usr/bin/env bash
# Build sdist and wheel, install the wheel into a fresh environment that sees the given
# interpreter's other packages, and run the tests from outside the checkout.
# usage: tests/installed_wheel.sh PYTHON
set -euo pipefail
python=$1
checkout=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --outdir "$work/dist" "$checkout"
"$python" -m twine check --strict "$work"/dist/*
"$python" -m venv --without-pip "$work/venv"
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m pip install --quiet --no-deps --target "$site" "$work"/dist/*.whl
# the dependencies, but not the editable install that hides the wheel
"$python" - "$site" <<'PY'
import pathlib, sys, sysconfig
other = pathlib.Path(sysconfig.get_path("purelib"))
pathlib.Path(sys.argv[1], "dependencies.pth").write_text(
    f"import sys; sys.path.append({str(other)!r})\n"
)
PY
cp -r "$checkout/tests" "$checkout/benchmarks" "$checkout/pyproject.toml" "$work/"
cd "$work"
"$work/venv/bin/python" -c 'import rankloss; print("testing", rankloss.__file__)'
"$work/venv/bin/python" -c "import rankloss, sys; sys.exit(not rankloss.__file__.startswith('$work'))"
# these test folders of the checkout that no wheel has
outside=(tests/benchmarks tests/kernels/test_aot.py tests/cc3m tests/demo tests/evaluation tests/self_distillation tests/test_examples.py)
"$work/venv/bin/python" -m pytest -q -n auto --maxprocesses 4 --dist loadfile \
    "${outside[@]/#/--ignore=}" "${@:2}"
