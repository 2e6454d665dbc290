"""lottery.tickets: from the store and back from a file, bit for bit; what is no ticket is told in one line."""

import concurrent.futures as futures
import hashlib
import json
import re
import struct
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import train
from torch import nn

from lottery import data, experiments, models, tensorfile, tickets, training
from lottery import lth as magnitude
from lottery import masks as M
from lottery.experiments import Store, lth

SPARSE = {"fc1": 15_360, "fc2": 24_000, "fc3": 900}  # what one round keeps of 19,200, 30,000 and 1,000 weights


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The dense network and the first round of the digits' preset: 2 × 100 iterations."""
    folder = tmp_path_factory.mktemp("stored")
    [run] = lth.setting("smoke").nets["lenet"].imp(0, 1)
    with futures.ThreadPoolExecutor(1) as pool:
        assert experiments.run([run], pool, store=Store(folder), progress=False) == []
    return folder


@pytest.fixture
def ticket(stored):
    return tickets.level(1, seed=0, store=Store(stored))


def equal(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_survivors_and_connections_by_hand():
    theta = {"fc1.weight": torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]]), "fc1.bias": torch.zeros(2)}
    m = torch.tensor([[True, False, False], [True, True, True]])
    ticket = tickets.Ticket(theta, {"fc1": m}, {})
    assert tickets.survivors(ticket)["fc1"].tolist() == [1, 4, 5, -6]
    assert tickets.connections({"fc1": m}, "in")["fc1"].tolist() == pytest.approx([1 / 3, 1])
    assert tickets.connections({"fc1": m}, "out")["fc1"].tolist() == [1, 0.5, 0.5]
    conv = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    conv[0, 0] = conv[1, 0, 0, 0] = True
    assert tickets.connections({"conv1": conv}, "in")["conv1"].tolist() == [4 / 12, 1 / 12]
    assert tickets.connections({"conv1": conv}, "out")["conv1"].tolist() == [5 / 8, 0, 0]
    with pytest.raises(ValueError, match=r"^Invalid direction 'up': give 'in' or 'out'\.$"):
        tickets.connections({"fc1": m}, "up")


def test_moves_by_hand():
    theta_0 = {"fc1.weight": torch.tensor([[0.3, -0.304, 0.0, 0.5]])}
    theta_J = {"fc1.weight": torch.tensor([[0.337, 0.2, 0.0, -2.0]])}
    moved = tickets.moves(theta_0, theta_J, {"fc1": torch.tensor([[True, True, False, False]])})

    def bins(counts):
        return {i: n for i, n in enumerate(counts) if n}

    assert {side: bins(c) for side, c in moved["distance"]["fc1"].items()} == {
        "in": {3: 1, 50: 1},
        "out": {0: 1, 79: 1},
    }
    # +0.037, -0.1 | 0, +1.5: bins of 0.01 around 0.04, -0.1, 0; the last one holds what is beyond
    assert {side: bins(c) for side, c in moved["growth"]["fc1"].items()} == {
        "in": {30: 1, 44: 1},
        "out": {40: 1, 119: 1},
    }


def test_a_ticket_of_the_store_is_the_initialisation_and_the_mask(ticket, stored):
    theta_0 = M.state(models.create("lenet_300_100", seed=0, in_shape=(1, 8, 8)))
    assert equal(ticket.theta, theta_0)
    assert {name: int(m.sum()) for name, m in ticket.masks.items()} == SPARSE
    assert ticket.density == pytest.approx(sum(SPARSE.values()) / 50_200)
    [run] = lth.setting("smoke").nets["lenet"].imp(0, 1)
    assert ticket.spec == run.spec()
    weights = load_file(Store(stored).artifact(run.parent.key))
    for name, m in ticket.masks.items():
        size = weights[f"{name}.weight"].abs()
        assert size[m].min() >= size[~m].max()


def test_a_ticket_of_a_run_that_prunes_some_layers_has_their_masks(tmp_path):
    base = lth.setting("smoke").nets["lenet"].base
    dense = replace(base, layers=("fc1", "fc3"))
    ticket = replace(dense, parent=dense, rate=0.5, rate_output=0.25)
    train([dense, ticket], tmp_path)
    found = tickets.stored(Store(tmp_path).get(ticket))
    assert {name: (tuple(m.shape), int(m.sum())) for name, m in found.masks.items()} == {
        "fc1": ((300, 64), 9_600),
        "fc3": ((10, 100), 750),
    }


def test_a_run_whose_mask_is_not_kept_is_told_in_one_line(stored):
    [run] = lth.setting("smoke").nets["lenet"].imp(0, 1)
    row = {**Store(stored).get(run), "mask": None}
    with pytest.raises(ValueError, match=rf"^No mask is kept of run {run.key}: [^\n]*\.$"):
        tickets.stored(row)


def test_the_dense_network_is_the_ticket_of_level_0(stored):
    ticket = tickets.level(0, store=Store(stored), scale="smoke")
    assert ticket.density == 1
    assert all(m.all() for m in ticket.masks.values())


def test_from_a_file_it_is_bitwise_the_same(ticket, tmp_path):
    path = tmp_path / "ticket.safetensors"
    tickets.save(ticket, path)
    back = tickets.load(path)
    assert equal(back.theta, ticket.theta)
    assert equal(back.masks, ticket.masks)
    assert back.spec == ticket.spec
    assert back.density == ticket.density
    assert tickets.load(str(path)).spec == ticket.spec


def test_a_model_trains_and_keeps_its_density(ticket):
    model, digits = ticket.model(), data.load("digits")
    assert equal(M.state(model), ticket.theta)
    assert equal(M.read(model), ticket.masks)
    history = training.fit(model, digits, training.Recipe(iterations=60, eval_every=30))
    assert history.last.test_acc > 0.8
    assert M.density(model) == ticket.density
    for name, layer in M.prunable(model).items():
        assert not layer.weight[~ticket.masks[name]].any()
    assert equal(M.state(ticket.model()), ticket.theta), "training one model must leave the ticket"


def test_drawing_a_ticket_leaves_torchs_random_state(stored):
    before = torch.get_rng_state()
    tickets.level(1, store=Store(stored)).model()
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_not_stored_is_told_in_one_line(stored):
    for options, text in (
        ({"level": 2}, "No run of level 2, seed 0 is stored at paper or primary or laptop or smoke: "),
        ({"level": 1, "seed": 3}, "No run of level 1, seed 3 is stored at "),
        ({"level": -1}, "No run of level -1, "),
        ({"level": 99}, "No run of level 99, "),
        ({"level": 2.5}, "Invalid level 2.5: give a whole number from 0."),
        ({"level": "1"}, "Invalid level '1': give a whole number from 0."),
        ({"level": 1, "scale": "paper"}, "No run of level 1, seed 0 is stored at paper: "),
        ({"level": 1, "scale": "huge"}, "Unknown scale 'huge': choose one of paper, primary, laptop, smoke."),
        ({"level": 1, "seed": "a"}, "Invalid seed 'a': give a whole number from 0."),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}") as told:
            tickets.level(**options, store=Store(stored))
        assert "\n" not in str(told.value)


def test_another_initialisation_than_the_one_that_trained_is_not_called_the_same(stored, tmp_path):
    [run] = lth.setting("smoke").nets["lenet"].imp(0, 1)
    row = dict(Store(stored).get(run))
    certificate = json.loads(row["certificate"])
    row["certificate"] = json.dumps({**certificate, "theta0": "0" * 64}, sort_keys=True)
    Store(tmp_path).put(row)
    assert tickets.level(1, store=Store(stored)).bitwise
    assert not tickets.level(1, store=Store(tmp_path)).bitwise


def test_no_file_is_told_in_one_line(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"^No ticket at {re.escape(str(path))}\\.$"):
            tickets.load(path)


SPEC = lth.setting("smoke").nets["lenet"].base.spec()


@pytest.mark.parametrize(
    "metadata",
    [None, {"other": "x"}, {"spec": "no json"}, {"spec": "{}"}, {"spec": "5"}, {"spec": json.dumps(SPEC)}],
)
def test_safetensors_that_are_no_ticket_are_told_in_one_line(tmp_path, metadata):
    path = tmp_path / "weights.safetensors"
    save_file({"theta/fc1.weight": torch.zeros(300, 64)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is no ticket: give a file that .*save wrote\\.$"):
        tickets.load(path)


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", b"\xff" * 500])
def test_any_other_file_is_told_in_one_line(tmp_path, content):
    path = tmp_path / "ticket.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is no ticket: "):
        tickets.load(path)


def test_a_truncated_ticket_is_told_in_one_line(ticket, tmp_path):
    path = tmp_path / "ticket.safetensors"
    tickets.save(ticket, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no ticket"):
        tickets.load(path)


def test_a_ticket_of_a_network_with_convolutions(tmp_path):
    model = M.attach(models.create("conv2", seed=3, in_shape=(1, 8, 8)))
    generator = torch.Generator().manual_seed(1)
    masks = {name: torch.rand(m.shape, generator=generator) < 0.3 for name, m in M.read(model).items()}
    run = replace(lth.setting("smoke").nets["lenet"].base, model="conv2", seed=3)
    ticket = tickets.Ticket(M.state(model), masks, run.spec())
    tickets.save(ticket, tmp_path / "conv.safetensors")
    back = tickets.load(tmp_path / "conv.safetensors")
    assert equal(back.theta, ticket.theta)
    assert equal(back.masks, masks)
    assert M.density(back.model()) == pytest.approx(M.density(masks))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_the_hash_is_of_the_bytes_of_any_dtype(dtype):
    a = {"w": torch.tensor([[0.0, 1.0], [1.0, 0.0]]).to(dtype), "count": torch.tensor(3)}
    b = {"count": torch.tensor(3), "w": a["w"].T.contiguous().T}  # other strides and order, equal values
    assert tickets.digest(a) == tickets.digest(b)
    assert tickets.digest(a) != tickets.digest({**a, "w": ~a["w"] if dtype == torch.bool else a["w"] + 1})


def test_the_hash_stays_what_the_store_has():
    theta = {"b": torch.tensor([1.0, -2.0]), "a": torch.tensor([[0.5]])}
    expected = hashlib.sha256(struct.pack("<3f", 0.5, 1.0, -2.0)).hexdigest()
    assert tickets.digest(theta) == expected


def test_saving_into_no_folder_names_it(ticket, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"No folder {tmp_path / 'none'}: make it first")):
        tickets.save(ticket, tmp_path / "none" / "t.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.long(),
        lambda t: torch.full_like(t, float("nan")),
        lambda t: t.index_fill(0, torch.tensor(0), float("inf")),
    ],
)
def test_weights_that_are_no_numbers_are_no_ticket_whoever_saved_them(ticket, tmp_path, change):
    theta = ticket.theta | {"fc2.weight": change(ticket.theta["fc2.weight"])}
    tickets.save(replace(ticket, theta=theta), path := tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="is no ticket"):
        tickets.load(path)


def nested(depth):
    found = {}
    for _ in range(depth):
        found = {"a": found}
    return found


@pytest.mark.parametrize(
    "spec",
    [
        SPEC | {"options": [["hidden", [10**6, 10**6]]]},
        SPEC | {"options": [["hidden", [10**12, 10**12]]]},
        SPEC | {"options": [["hidden", [10**30, 1]]]},
        SPEC | {"options": 5},
        SPEC | {"model": "vgg19"},
        SPEC | {"dataset": "../../x"},
        SPEC | {"own": 5},
        nested(900),
        [],
    ],
    ids=range(9),
)
def test_a_specification_that_somebody_made_up_is_no_ticket(ticket, tmp_path, spec):
    """Neither is memory asked for that the file does not fill."""
    tensorfile.write(path := tmp_path / "t.safetensors", load_tensors(ticket), {"spec": spec, "bitwise": True})
    with pytest.raises(ValueError, match=r"is no ticket|is the ticket of a 5"):
        tickets.load(path)


def test_a_file_nested_beyond_reading_is_no_ticket(ticket, tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    save_file(load_tensors(ticket), path := tmp_path / "t.safetensors", metadata={"about": deep})
    with pytest.raises(ValueError, match="is no ticket"):
        tickets.load(path)


def load_tensors(ticket):
    return {f"theta/{name}": t for name, t in ticket.theta.items()} | {f"mask/{k}": t for k, t in ticket.masks.items()}


def test_a_finite_weight_or_a_mask_that_was_changed_is_no_ticket(ticket, tmp_path):
    tickets.save(ticket, path := tmp_path / "t.safetensors")
    with safe_open(path, "pt") as f:
        facts = f.metadata()
    for name, change in (("theta/fc1.bias", lambda t: t + 4e37), ("mask/fc3", torch.logical_not)):
        tensors = load_file(path)
        save_file(tensors | {name: change(tensors[name])}, other := tmp_path / "o.safetensors", metadata=facts)
        with pytest.raises(ValueError, match="is no ticket"):
            tickets.load(other)
    assert tickets.load(path).bitwise


def test_whether_it_is_bitwise_is_kept(ticket, tmp_path):
    tickets.save(replace(ticket, bitwise=False), tmp_path / "t.safetensors")
    assert tickets.load(tmp_path / "t.safetensors").bitwise is False


def test_tied_weights_and_a_layer_alone_have_one_name_in_states_and_masks():
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tied[1].weight = tied[0].weight
    for net in (tied, nn.Linear(4, 4)):
        theta, kept = M.state(net), magnitude.prune(net, 0.5)
        [name] = kept
        [values] = tickets.survivors(tickets.Ticket(theta, kept, {})).values()
        assert torch.equal(values, net.get_parameter(M.weight_name(name))[kept[name]])
        assert tickets.moves(theta, theta, kept)["growth"][name]["in"][40] == int(kept[name].sum())
        drawn = magnitude.from_survivors(theta, kept)
        assert set(drawn[M.weight_name(name)].flatten().tolist()) <= set(values.tolist())
        noisy = magnitude.add_noise(theta, kept, 1.0)
        assert (noisy[M.weight_name(name)] != theta[M.weight_name(name)]).all()
        M.restore(net, drawn)
    with pytest.raises(ValueError, match=r"^Unknown names in layers: 7; the state has 1\.$"):
        tickets.survivors(tickets.Ticket(M.state(tied), {"7": torch.ones(5, 4, dtype=torch.bool)}, {}))


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("causal", torch.full((3, 3), float("-inf")).triu(1))


def test_a_buffer_of_infinities_comes_back(tmp_path):
    """A causal mask holds them; where the model's own tensor is finite the file's has to be."""
    model = M.attach(Causal())
    ticket = tickets.Ticket(M.state(model), M.read(model), {"own": "Causal"})
    tickets.save(ticket, path := tmp_path / "t.safetensors")
    assert equal(tickets.load(path, Causal()).theta, ticket.theta)
    assert equal(M.state(ticket.model(Causal())), ticket.theta)
    with pytest.raises(ValueError, match=r"^The ticket is that of a Causal of one's own: give model\(net\) such a"):
        ticket.model()
    for name, t in (("causal", torch.full((3, 3), float("-inf"))), ("causal", torch.zeros(2, 2))):
        tickets.save(replace(ticket, theta=ticket.theta | {name: t}), path)
        with pytest.raises(ValueError, match="is no ticket"):
            tickets.load(path, Causal())


def test_tensors_of_a_ticket_may_share_memory(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    theta = M.state(net)
    theta |= {"1.weight": theta["0.weight"]}
    ones = torch.ones(4, 4, dtype=torch.bool)
    tickets.save(tickets.Ticket(theta, {"0": ones, "1": ones}, {"own": "Sequential"}), tmp_path / "t.safetensors")
    again = tickets.load(tmp_path / "t.safetensors", net)
    assert torch.equal(again.theta["1.weight"], theta["0.weight"])
