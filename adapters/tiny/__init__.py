"""Tiny random models of every family: tables of configurations, built without weights, in milliseconds.

``tokred doctor`` and the tests run the laws on them. One module for each library of encoders, and one for each other
wing; a host library is imported when one of its models is built. The models of ``recall`` and ``sight`` are not random:
their weights are written by hand, so that what they answer is right or wrong.
"""
