# Sourced by the scripts beside it: a fresh virtual environment in build/, with this checkout and its tests' needs in it.

unset PYTHONPATH PYTHONHOME VIRTUAL_ENV

# README says python3. Where that is too old but a newer one is there under another name, that one is taken.
recent_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$name"
      return
    fi
  done
  printf 'no Python 3.11 or later was found (looked for python3 and python3.11 to python3.14)\n' >&2
  exit 1
}

# fresh FOLDER REQUIREMENT... : the environment, made anew.
fresh() {
  local folder=$1
  shift
  rm -rf "$folder"
  "$(recent_python)" -m venv "$folder"
  "$folder/bin/pip" install --quiet --upgrade "$@" -e ".[dev,bench]"
}
