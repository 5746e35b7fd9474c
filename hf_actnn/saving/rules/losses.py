"""Losses and what feeds them are exact: they are small, and every gradient starts there."""

from hf_actnn.saving.rules.rule import Rule, functions, nothing, register

LOSS = register(
    Rule("loss", nothing, bounded="kept exactly", exact_reason="a loss is exact"),
    functions(
        "cross_entropy",
        "nll_loss",
        "log_softmax",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "kl_div",
        "cosine_embedding_loss",
        "ctc_loss",
        "gaussian_nll_loss",
        "poisson_nll_loss",
        "hinge_embedding_loss",
        "margin_ranking_loss",
        "multi_margin_loss",
        "multilabel_margin_loss",
        "multilabel_soft_margin_loss",
        "soft_margin_loss",
        "triplet_margin_loss",
        "triplet_margin_with_distance_loss",
        "logsumexp",
    ),
)
