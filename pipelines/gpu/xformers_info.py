"""Print what `python -m xformers.info` prints, after importing xformers the way our attention kernel does."""

from ar_model.cuda_backends import import_xformers

if __name__ == "__main__":
    import_xformers()
    from xformers.info import print_info

    print_info()
