"""Print environment.yml, the conda form of requirements.lock: the same pins in the same order, without the hashes."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# Generated from requirements.lock by `make lock`. `conda env create --file environment.yml` is the conda form of what
# `make book` and `make test` install into .venv.
name: lottery
channels:
  - conda-forge
dependencies:
  - python >=3.11,<3.13
  - make
  - pip
  - pip:
      - --editable .
"""


def main() -> None:
    pins = re.findall(r"^([a-z0-9].*?)\s*\\$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    print(HEAD + "\n".join(f'      - "{pin}"' for pin in pins))


if __name__ == "__main__":
    main()
