"""`python -m data.cache` (tool.py)."""

from data.cache.tool import main

if __name__ == "__main__":
    main()
