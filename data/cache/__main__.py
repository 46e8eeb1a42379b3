"""Entry point of `python -m data.cache`; see tool.py."""

from data.cache.tool import main

if __name__ == "__main__":
    main()
