"""`python -m data.cache`: an entry point, so it may compose all packages (pipelines/cache_tool.py)."""

from pipelines.cache_tool import main

if __name__ == "__main__":
    main()
