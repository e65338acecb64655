"""The protocols of `bigbigan evaluate` as functions: data and models in, an `Evaluation` out."""
