# Sourced by demo/demo.sh and tests/run.sh from the repository's root: makes .venv and installs requirements.txt, once.
fail() {
    echo "error: $*" >&2
    exit 1
}

command -v python3 >/dev/null || fail "python3 is not installed: install Python 3.10 or newer"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$(python3 --version) is too old: install Python 3.10 or newer"

installed=.venv/requirements.installed
if ! cmp -s requirements.txt "$installed"; then
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge 5 ] || fail "only $free GiB free here: 5 GiB are needed for the packages and the models"
    echo "installing requirements.txt into .venv (once, some minutes)"
    [ -x .venv/bin/pip ] || python3 -m venv --clear .venv || fail "cannot make .venv: install Python's venv module"
    # deepspeed's set-up runs without torch in its build environment; only its Python part is needed
    DS_BUILD_OPS=0 .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt 2>.venv/pip.log ||
        fail "pip could not install requirements.txt: $(grep -i error .venv/pip.log | tail -n 1) (all of it: .venv/pip.log)"
    cp requirements.txt "$installed"
fi
. .venv/bin/activate
