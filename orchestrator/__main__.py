"""``python -m orchestrator`` is ``starling``."""

from orchestrator.cli import main

if __name__ == "__main__":
    main()
