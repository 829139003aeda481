"""Trained models as objects that answer requests; needs no trainer."""

from grank_kernels.recommender.serving.retriever import Retriever

__all__ = ["Retriever"]
