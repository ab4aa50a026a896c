"""The four modular pipelines that every experiment is composed of, and the studies beside them."""
