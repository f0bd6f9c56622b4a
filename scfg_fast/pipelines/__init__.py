"""The diffusers pipelines that S-CFG runs in: a table of them, how one call is read, and what is refused."""
