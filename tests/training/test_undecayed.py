from dataclasses import replace

from tiny_run import FIT, TinyStream, digest, make_dino

from gigatome.training.loop import fit


def ended(out, weight_decay, undecayed):
    """Weights at the end of two steps; the method names parts of its parameters if it names any."""
    dino = make_dino()
    if undecayed is not None:
        dino.undecayed = lambda: [name for name, _ in dino.named_parameters() if undecayed in name]
    fit(
        dino,
        TinyStream(),
        replace(FIT, steps=2, warmup_steps=0, weight_decay=weight_decay, weight_decay_end=weight_decay),
        out,
    )
    return digest(dino.state_dict())


def test_a_method_says_which_parameters_do_not_decay(tmp_path):
    decayed = ended(tmp_path / "decayed", 0.5, None)
    assert ended(tmp_path / "none", 0.5, "") == ended(tmp_path / "without", 0.0, None)
    assert ended(tmp_path / "nothing", 0.5, "no such parameter") == decayed
    assert len({decayed, ended(tmp_path / "one", 0.5, "pos_embed"), ended(tmp_path / "all", 0.5, "")}) == 3
