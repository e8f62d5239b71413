"""``python -m starling`` is ``starling``."""

from starling.orchestrator.cli.main import main

if __name__ == "__main__":
    main()
