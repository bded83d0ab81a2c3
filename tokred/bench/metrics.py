"""Metrics of the results: unit, interval, and a word each; and the conditions under which they are measured."""

from __future__ import annotations

from typing import NamedTuple

QUARTILES = "quartiles over rounds"
INTERVAL = "95 % interval"


class Metric(NamedTuple):
    """One kind of number.

    Attributes:
        unit: ``share`` (0 to 1), ``x`` (a ratio), ``ms``, ``bytes``, ...
        doc: its meaning.
        interval: what ``low`` and ``high`` are; empty: there are none.
        of: the field of a record that says how many things were counted or averaged.
    """

    unit: str
    doc: str
    interval: str = ""
    of: str = ""


def _time(unit: str, doc: str) -> Metric:
    return Metric(unit, doc, QUARTILES, "rounds")


METRICS: dict[str, Metric] = {
    # Work and tokens
    "tokens_in": Metric("tokens", "that enter the first block"),
    "tokens_out": Metric("tokens", "that leave the last block"),
    "tokens_left": Metric("tokens", "of the reduced kind (visual, or of the finest attention) at the last layer"),
    "tokens_mean": Metric("tokens", "mean over the inputs of all layers, text included"),
    "visual_mean": Metric("tokens", "visual, mean over the inputs of all layers"),
    "generated": Metric("tokens", "of an answer, its end counted, mean over samples", INTERVAL),
    "gmacs": Metric("GMACs", "counted multiply-adds of one input"),
    "gmacs_share": Metric("share", "of the unpatched model's multiply-adds"),
    "ceiling": Metric("x", "how fast counted multiply-adds would let it be"),
    # Quality
    "top1": Metric("share", "of right answers", INTERVAL, "top1_images"),
    "recall": Metric("share", "of the patches that the object covers: those left behind the last block", INTERVAL),
    "top1_difference": Metric(
        "share", "of right answers, minus the unpatched model's on the same images", INTERVAL, "top1_images"
    ),
    "top5": Metric("share", "of right answers among the five likeliest", INTERVAL),
    "probe": Metric("share", "of right answers of linear probes, fitted on the other half of the samples", INTERVAL),
    "quality": Metric("score", "by the user's own metric, which `scored_by` names", INTERVAL),
    "difference": Metric(
        "score",
        "of the quality that `scored_by` names, minus the unpatched model's on the same inputs; of perplexities the "
        "ratio, minus one",
        INTERVAL,
    ),
    "gain": Metric(
        "score",
        "quality minus the best constant schedule's on the same inputs; of perplexities as `difference`",
        INTERVAL,
    ),
    "chance": Metric("share", "of the largest class", "", "top1_images"),
    "agreement": Metric("share", "of the unpatched model's answers", INTERVAL, "images"),
    "exact": Metric("share", "of answers that are right word for word", INTERVAL, "images"),
    "answer_lost": Metric(
        "share", "of the answer's probability that is lost where visual tokens leave", INTERVAL, "images"
    ),
    "exact_lift": Metric(
        "share", "of right answers, minus those of the method that is wrapped, on the same samples", INTERVAL
    ),
    "cosine": Metric("cosine", "of features with the unpatched model's, mean over inputs", INTERVAL, "cosine_images"),
    "cosine_lowest": Metric("cosine", "the same, of the worst input", "", "cosine_images"),
    "saliency_mae": Metric("error", "mean absolute error of the restored saliency map", INTERVAL, "cosine_images"),
    "saliency_correlation": Metric("correlation", "of the restored saliency map", INTERVAL, "cosine_images"),
    "saliency_iou": Metric("share", "overlap of the salient parts", INTERVAL, "cosine_images"),
    "accuracy": Metric("share", "of topics that the linear probe names", INTERVAL, "texts"),
    "contains": Metric("share", "of answers in which a right one occurs", INTERVAL),
    "contains_all": Metric("share", "of right answers that occur in the model's, mean over samples", INTERVAL),
    "overlap": Metric("share", "F1 of the longest common subsequence of words with the reference (ROUGE-L)", INTERVAL),
    "wer": Metric("share", "wrong words over words of the references, of all samples together", INTERVAL),
    "miou": Metric("share", "overlap of class maps, mean over the classes of a sample and over samples", INTERVAL),
    "word_error": Metric("share", "of the unmerged transcripts' words that are wrong", INTERVAL, "words"),
    "unchanged": Metric("share", "of transcripts that are the unmerged model's, word for word", INTERVAL, "prompts"),
    "psnr": Metric("dB", "against the unmerged image of the same seed, mean over samples", INTERVAL, "samples"),
    "ssim": Metric("similarity", "structural, to the unpatched model's image, mean over samples", INTERVAL),
    "lpips": Metric("distance", "of AlexNet's features to the unpatched model's image, mean over samples", INTERVAL),
    "mae": Metric("error", "mean absolute error against the unmerged image", INTERVAL, "samples"),
    "spectrum_db": Metric("dB", "distance of the radial spectra to the unmerged image's", INTERVAL, "samples"),
    "perplexity": Metric("perplexity", "of the tokens behind a compressed prompt", INTERVAL, "tokens_scored"),
    "perplexity_ratio": Metric("x", "over the full cache's perplexity", INTERVAL),
    "over_kvzip": Metric("x", "perplexity over that of kvzip at as many rows, on the same windows", INTERVAL),
    "over_kvzip_recent": Metric("x", "the same, over kvzip that keeps first and newest rows too", INTERVAL),
    "attention_read": Metric(
        "share", "of the attention that the best rows of each head would get, what falls on those read", INTERVAL
    ),
    "rows_found": Metric("share", "of the best rows of each head, those read", INTERVAL),
    "over_single": Metric(
        "x",
        "perplexity of a policy in a format over that of the policy or format that it beats least surely at the same "
        "bytes, on the same windows",
        INTERVAL,
    ),
    "keys_over_single": Metric(
        "share",
        "of keys found by a policy in a format, minus that of the policy or format that it beats least surely at the "
        "same bytes, on the same samples",
        INTERVAL,
    ),
    "retrieval": Metric("share", "of hidden keys that the answer begins with", INTERVAL, "keys"),
    "nll": Metric("nats", "negative log-likelihood of the tokens of hidden keys, mean over keys"),
    "kl": Metric("nats", "divergence from what the unpatched model says of every token behind the prompt, mean"),
    "apart": Metric("standard errors", "better than a random choice at the same budget, paired over samples"),
    "keys_found": Metric("share", "of the keys of a search"),
    "loss": Metric("loss", "log of the ratio of perplexities plus the share of keys lost, mean over budgets"),
    # Speed
    "images_per_second": _time("images/s", "of whole forwards"),
    "beside": _time("x", "times as fast as the best constant schedule of the same round"),
    "speedup": _time("x", "times as fast as the base of the same round"),
    "of_ceiling": _time("x", "speed over that of the model that slices off as many tokens"),
    "seconds": _time("s", "of a forward or a denoising step"),
    "tower_speedup": _time("x", "times as fast the tower is as that of the same round's base"),
    "tower_seconds": _time("s", "of the run that a vision tower takes"),
    "encoder_seconds": _time("s", "of the run that an encoder takes"),
    "selection_seconds": _time("s", "of the run that methods take to decide"),
    "prompt_seconds": _time("s", "of the run that a decoder takes for prompts"),
    "decode_seconds": _time("s", "of the run that a decoder takes for single tokens"),
    "denoiser_seconds": _time("s", "of the run that a denoiser takes"),
    "rest_seconds": _time("s", "of the run that all else takes"),
    "ms": _time("ms", "of a call or a forward"),
    "chain_ms": _time("ms", "of the plain chain of torch operations"),
    "floor_ms": Metric("ms", "least time of the call, as counted"),
    "times_floor": Metric("x", "time over the floor"),
    "reduce_share": Metric("share", "of the forward that deciding and merging take, by a profile"),
    "own_work": _time("share", "of the forward that deciding and merging take"),
    "decision_share": _time("share", "of the forward that deciding takes"),
    "decision_work": Metric("share", "of the forward's multiply-adds that deciding takes, by a count"),
    "plan_share": Metric("share", "of a step that deciding takes", "", "rounds"),
    "prefill_ms": _time("ms", "of the prompt"),
    "prefill_s": Metric("s", "of the prompt, read once"),
    "decode_tokens_per_s": Metric("tokens/s", "median over generated tokens", "", "tokens_timed"),
    "ms_to_first_token": _time("ms", "up to the first token of an answer"),
    "ms_a_token": _time("ms", "of a generated token"),
    "ratio": _time("x", "time of a token, or a prompt, over that of a dense cache of as many rows in the same round"),
    "ratio_bfloat16": _time("x", "the same, over that of a dense cache in bfloat16"),
    "ratio_in_place": _time("x", "the same, over that of a dense cache that adds rows without a copy"),
    "policy_ms": _time("ms", "all that a policy does at the end of a prompt"),
    "score_ms": _time("ms", "observing and scoring"),
    "select_ms": _time("ms", "budget and choice of rows"),
    "evict_ms": _time("ms", "copying what stays"),
    "policy_share": _time("share", "of the prompt's time that a policy takes"),
    "kvpress_ms": _time("ms", "of kvpress, scoring one layer"),
    "layers_ms": _time("ms", "of the decoder layers that were run"),
    "dense_ms": _time("ms", "of the unpatched prompt"),
    "dense_full_depth_ms": _time("ms", "the same, scaled to the real depth"),
    "own_ms": _time("ms", "all that the patch does in the forward"),
    "decide_ms": _time("ms", "deciding alone"),
    "own_full_depth_ms": _time("ms", "all that the patch does, scaled to the real depth"),
    "share_of_measured": _time("share", "of the dense prompt that the patch takes, at the layers that were run"),
    "share_of_full_depth": _time("share", "of the dense prompt that the patch takes, at the real depth"),
    "times_short": _time("x", "over an unpatched prompt of so few visual tokens"),
    "times_short_full_depth": _time("x", "the same at the real depth"),
    "tower_ms": Metric("ms", "of the tower, which no other figure holds"),
    # Memory
    "peak_mib": Metric("MiB", "peak: torch's on CUDA, else the process's resident high-water mark"),
    "forward_mib": Metric("MiB", "the peak above what was in use before the forward"),
    "call_mib": Metric("MiB", "that a call allocates at most at a time"),
    "chain_mib": Metric("MiB", "the same of the plain chain"),
    "memory_ratio": Metric("x", "memory of a call over the chain's"),
    "bytes": Metric("bytes", "that a cache holds for a sample after the prompt", "", "prompts"),
    "bytes_window": Metric("bytes", "the same after the prompts of the perplexity", "", "prompts"),
    "bytes_timed": Metric("bytes", "the same after the prompts that are timed"),
    "kvpress_bytes": Metric("bytes", "that kvpress's cache holds after the same prompt"),
    "most_bytes": Metric("bytes", "held at any layer since the row before"),
    "solved": Metric("value", "of the setting that was solved from the bytes held"),
    "bytes_share": Metric("share", "of the bytes that a full cache would hold"),
    "dense_bytes": Metric("bytes", "of a cache that keeps everything"),
    "extra_bytes": Metric("bytes", "that scoring and compressing add to what is in use"),
    "matrix_bytes": Metric("bytes", "that the attention of all queries to all keys would take"),
    "rows_left": Metric("rows", "of the layer's cache after the prompt"),
    # Checks
    "error": Metric("error", "relative error against float64"),
    "plain_error": Metric("error", "the same of the plain chain"),
    "met": Metric("flag", "1 where the goal was reached"),
    "failed": Metric("flag", "1 where the check against float64 failed"),
    "refused": Metric("flag", "1 where the method refuses"),
    "max_abs_difference": Metric("score", "largest difference of scores to kvpress"),
    "largest": Metric("score", "largest score"),
    "rows_differ": Metric("rows", "that one keeps and the other does not", "", "rows_kept"),
}

# How a number was taken, where the method's own setting does not say so; none is a parameter of a method.
CONDITIONS = (
    "asked", "length", "batch", "tokens", "stage", "case", "input", "size", "width", "depth", "full_depth",
    "tower_depth", "moments", "rows", "weights", "answered_by", "data", "photos", "keeps", "visual", "text",
    "decides", "goal", "memory", "quarter", "difficulty", "fed", "scored_by", "clock", "frames",
    "chunks", "front", "blank",
)  # fmt: skip
