"""Conversion of DeepMind's BigBiGAN modules and of third-party checkpoints into model folders.

The only place that imports TensorFlow, and only when a module is read. Nothing of a module is ever run as a program:
its graph and variables are read as data, and single allow-listed numeric operations are evaluated one by one.
"""
