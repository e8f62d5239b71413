"""Topologies: mixing matrices against closed forms, with any members missing; what is kept; what is refused."""

from __future__ import annotations

import itertools
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from starling.algorithms.errors import SettingsError
from starling.algorithms.registry import table
from starling.algorithms.topologies import Mixing, Ring, Topology
from starling.algorithms.topologies.alternating import Alternating
from starling.algorithms.topologies.barabasi_albert import BarabasiAlbert
from starling.algorithms.topologies.complete import Complete
from starling.algorithms.topologies.erdos_renyi import ErdosRenyi
from starling.algorithms.topologies.exponential import Exponential
from starling.algorithms.topologies.file import File
from starling.algorithms.topologies.given import cycles_without
from starling.algorithms.topologies.one_peer_exponential import OnePeerExponential
from starling.algorithms.topologies.random_matching import RandomMatching
from starling.algorithms.topologies.random_regular import RandomRegular
from starling.algorithms.topologies.torus import Torus

ALL = [
    Complete(),
    Ring(),
    Torus(),
    Torus(rows=3),
    Exponential(),
    OnePeerExponential(),
    ErdosRenyi(probability=0.4),
    BarabasiAlbert(num_edges=2),
    RandomMatching(matchings=2),
    RandomMatching(matchings=3),
    RandomRegular(degree=3),
    RandomRegular(degree=5, redraw_every=2),
    Alternating(topologies=(Ring(), OnePeerExponential(), ErdosRenyi(redraw_every=1))),
]


def name(topology: Topology) -> str:
    return topology.name


def mix(topology: Topology, num_nodes: int, round_number: int = 0, seed: int = 0) -> Mixing:
    return topology.mixing(tuple(range(num_nodes)), round_number, seed)


def edges(mixing: Mixing) -> set[tuple[int, int]]:
    """Receiver and sender."""
    return {(node, other) for node in mixing.weights for other in mixing.in_neighbors(node)}


def check(mixing: Mixing, members: tuple[int, ...], present: frozenset[int], *, symmetric: bool) -> None:
    """Rows and columns sum to 1 within 1e-15·N; all weights are above 0; who is missing keeps to itself."""
    assert list(mixing.weights) == list(members)
    columns: dict[int, list[float]] = {node: [] for node in members}
    for node, row in mixing.weights.items():
        assert list(row) == sorted(row)
        assert row[node] > 0
        assert all(weight > 0 for weight in row.values())
        assert abs(math.fsum(row.values()) - 1) <= 1e-15 * len(members)
        assert set(row) <= present if node in present else row == {node: 1.0}
        for other, weight in row.items():
            columns[other].append(weight)
            if symmetric:
                assert mixing.weights[other][node] == weight
    assert all(abs(math.fsum(column) - 1) <= 1e-15 * len(members) for column in columns.values())


# --- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_nodes", [4, 5, 8, 13])
def test_ring(num_nodes):
    mixing = mix(Ring(), num_nodes)
    assert [len(row) for row in mixing.weights.values()] == [3] * num_nodes
    assert [weight for row in mixing.weights.values() for weight in row.values()] == pytest.approx(
        [1 / 3] * 3 * num_nodes
    )
    assert mixing.rho == pytest.approx((1 + 2 * math.cos(2 * math.pi / num_nodes)) / 3, abs=1e-14)
    assert mixing.spectral_gap == 1 - mixing.rho
    assert mixing.num_messages == 2 * num_nodes


@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (3, 5), (3, 3), (6, 4)])
def test_torus(rows, cols):
    mixing = mix(Torus(rows=rows), rows * cols)
    rho = max(
        abs(1 + 2 * math.cos(2 * math.pi * down / rows) + 2 * math.cos(2 * math.pi * across / cols)) / 5
        for down, across in itertools.product(range(rows), range(cols))
        if (down, across) != (0, 0)
    )
    assert mixing.rho == pytest.approx(rho, abs=1e-14)
    assert all(len(row) == 5 for row in mixing.weights.values())
    assert mixing.in_neighbors(0) == (1, cols - 1, cols, (rows - 1) * cols)


def test_the_torus_of_sixteen():
    assert mix(Torus(), 16).rho == pytest.approx(0.6, abs=1e-14)


@pytest.mark.parametrize("tau", [1, 2, 3, 5])
def test_exponential(tau):
    mixing = mix(Exponential(), 2**tau)
    assert mixing.rho == pytest.approx(1 - 2 / (tau + 1), abs=1e-14)
    assert mixing.is_doubly_stochastic
    assert mixing.is_symmetric == (tau == 1)
    assert mixing.num_messages == tau * 2**tau
    assert set(mixing.in_neighbors(0)) == {2**k for k in range(tau)}


@pytest.mark.parametrize("num_nodes", [1, 2, 5, 16])
def test_complete(num_nodes):
    mixing = mix(Complete(), num_nodes)
    assert (mixing.matrix() == 1 / num_nodes).all()
    assert mixing.rho == 0
    assert mixing.num_messages == num_nodes * (num_nodes - 1)


@pytest.mark.parametrize("first_round", [0, 3])
@pytest.mark.parametrize("tau", [1, 2, 4])
def test_one_peer_exponential_is_exact_after_tau_rounds(tau, first_round):
    num_nodes = 2**tau
    values = np.random.default_rng(0).integers(-1000, 1000, (num_nodes, 3)).astype(float)
    mixed = values
    for number in range(first_round, first_round + tau):
        mixing = mix(OnePeerExponential(), num_nodes, number)
        assert mixing.num_messages == num_nodes
        mixed = mixing.matrix() @ mixed
    assert (mixed == values.mean(axis=0)).all()


def test_one_peer_exponential_takes_the_offsets_in_turn():
    senders = [mix(OnePeerExponential(), 9, number).in_neighbors(5) for number in range(5)]
    assert senders == [(6,), (7,), (0,), (4,), (6,)]


def test_metropolis_hastings_on_a_star(tmp_path: Path):
    (tmp_path / "star").write_text("0 1\n0 2\n0 3\n")
    assert mix(File(path=str(tmp_path / "star")), 4).weights == {
        0: {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25},
        1: {0: 0.25, 1: 0.75},
        2: {0: 0.25, 2: 0.75},
        3: {0: 0.25, 3: 0.75},
    }


@pytest.mark.parametrize(("degree", "num_nodes"), [(2, 7), (3, 8), (4, 9), (7, 10), (9, 10)])
def test_random_regular(degree, num_nodes):
    for seed in range(5):
        mixing = mix(RandomRegular(degree=degree), num_nodes, seed=seed)
        assert {len(mixing.in_neighbors(node)) for node in range(num_nodes)} == {degree}
        assert mixing.weights[0][mixing.in_neighbors(0)[0]] == 1 / (degree + 1)
        assert mixing.rho < 1 - 1e-9


def test_barabasi_albert_grows_from_a_clique():
    mixing = mix(BarabasiAlbert(num_edges=2), 50)
    assert mixing.num_messages == 2 * (2 * 50 - 2 - 1)
    assert edges(mix(BarabasiAlbert(num_edges=2), 3)) == set(itertools.permutations(range(3), 2))
    degrees = [len(mixing.in_neighbors(node)) for node in range(50)]
    assert min(degrees) == 2
    assert max(degrees) >= 10
    assert 0.85 < mixing.rho < 0.97


def test_erdos_renyi_has_the_edges_that_its_probability_says():
    mean = np.mean([mix(ErdosRenyi(probability=0.3), 40, seed=seed).num_messages for seed in range(30)])
    assert mean == pytest.approx(0.3 * 40 * 39, rel=0.05)
    assert mix(ErdosRenyi(probability=1), 6).num_messages == 30


@pytest.mark.parametrize("topology", ALL, ids=name)
@pytest.mark.parametrize("num_nodes", [1, 2, 3])
def test_few_nodes(topology, num_nodes):
    found = edges(mix(topology, num_nodes))
    everybody = set(itertools.permutations(range(num_nodes), 2))
    if num_nodes == 3 and isinstance(topology, OnePeerExponential):
        assert found == {(0, 1), (1, 2), (2, 0)}
    elif num_nodes == 3 and (isinstance(topology, ErdosRenyi) or topology == RandomMatching(matchings=2)):
        assert found in [everybody - {(i, j), (j, i)} for i, j in ((0, 1), (0, 2), (1, 2))]
    else:
        assert found == everybody
    assert mix(topology, num_nodes).rho < 1


# --- what mixing does -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ALL, ids=name)
def test_mixing_preserves_the_mean_and_contracts(topology):
    values = np.random.default_rng(1).standard_normal((12, 5))
    mean = values.mean(axis=0)
    for number in range(8):
        mixing = mix(topology, 12, number)
        mixed = mixing.matrix() @ values
        assert np.abs(mixed.mean(axis=0) - mean).max() <= 1e-15 * 12
        assert np.linalg.norm(mixed - mean) <= mixing.rho * np.linalg.norm(values - mean) + 1e-14
        values = mixed


def test_neighbors_of_a_mixing():
    mixing = Mixing({2: {2: 0.5, 9: 0.5}, 5: {2: 0.25, 5: 0.75}, 9: {9: 1.0}})
    assert [mixing.in_neighbors(node) for node in (2, 5, 9)] == [(9,), (2,), ()]
    assert [mixing.out_neighbors(node) for node in (2, 5, 9)] == [(5,), (), (2,)]
    assert mixing.num_messages == 2
    assert mixing.matrix().tolist() == [[0.5, 0, 0.5], [0.25, 0.75, 0], [0, 0, 1]]
    assert mixing.matrix().dtype == np.float64
    assert not mixing.is_doubly_stochastic
    assert not mixing.is_symmetric
    assert Mixing({}).rho == 0


@pytest.mark.parametrize("topology", ALL, ids=name)
def test_neighbors_agree(topology):
    mixing = mix(topology, 12, 1)
    assert edges(mixing) == {(to, node) for node in mixing.weights for to in mixing.out_neighbors(node)}
    assert topology.num_messages(12, 1) == mixing.num_messages == len(edges(mixing))
    assert mixing.is_doubly_stochastic
    assert mixing.is_symmetric or not topology.symmetric


def test_the_norm_is_the_same_for_symmetric_and_other_matrices():
    for topology in (Ring(), Exponential(), Torus()):
        matrix = mix(topology, 12).matrix()
        singular = np.linalg.svd(matrix - 1 / 12, compute_uv=False)
        assert mix(topology, 12).rho == pytest.approx(singular[0], abs=1e-14)


# --- members come and go --------------------------------------------------------------------------------------------


@st.composite
def memberships(draw):
    members = tuple(sorted(draw(st.sets(st.integers(0, 1000), min_size=1, max_size=20))))
    present = draw(st.sets(st.sampled_from(members)) | st.just(set(members)))
    return members, frozenset(present)


@pytest.mark.parametrize("topology", ALL, ids=name)
@given(membership=memberships(), round_number=st.integers(0, 20), seed=st.integers(0, 3))
def test_whoever_is_missing(topology, membership, round_number, seed):
    members, present = membership
    whole = topology.mixing(members, round_number, seed)
    check(whole, members, frozenset(members), symmetric=topology.symmetric)
    part = topology.mixing(members, round_number, seed, present)
    check(part, members, present, symmetric=topology.symmetric)
    among = {edge for edge in edges(whole) if present.issuperset(edge)}
    chains = [(node, chain) for node, row in whole.substitutes.items() for chain in row if node in present]
    firsts = {(node, next((one for one in chain if one in present), node)) for node, chain in chains}
    assert edges(part) <= (firsts or among)
    if topology.symmetric:
        assert edges(part) == among


@pytest.mark.parametrize("topology", ALL, ids=name)
def test_places_are_taken_in_sorted_order(topology):
    members = (3, 7, 8, 20, 21, 40, 41, 42)
    place = {node: index for index, node in enumerate(members)}
    whole, there = mix(topology, 8, 2), topology.mixing(members, 2, 0)
    assert {(place[i], place[j]) for i, j in edges(there)} == edges(whole)


@pytest.mark.parametrize("topology", ALL, ids=name)
def test_a_run_may_shrink_and_grow_to_any_number(topology):
    for num_nodes in range(1, 24):
        product = np.eye(num_nodes)
        for number in range(topology.period(num_nodes) or 24):
            product = mix(topology, num_nodes, number).matrix() @ product
        # Nobody is left alone: of a node, or of a few, that keep to themselves, the norm would be 1.
        assert np.linalg.norm(product - 1 / num_nodes, 2) < 0.999, num_nodes


def test_an_open_ring_is_a_chain():
    mixing = Ring().mixing((0, 1, 2, 3), 0, 0, {0, 1, 3})
    third, rest = 1 / 3, 1 - 1 / 3
    assert mixing.weights[0] == pytest.approx({0: third, 1: third, 3: third})
    assert mixing.weights[1] == pytest.approx({0: third, 1: rest})
    assert mixing.weights[2] == {2: 1.0}


def test_the_gaps_of_directed_cycles_are_closed():
    # Offset 2 among six has the cycles (0 2 4) and (1 3 5), offset 1 and 4: one of all, and again two of three.
    mixing = Exponential().mixing(tuple(range(6)), 0, 0, {0, 1, 2, 4, 5})
    assert mixing.weights[1] == {1: 0.25, 2: 0.25, 5: 0.5}  # 3, missing, is left out of 1 → 2, 1 → (3) → 5 and 1 → 5
    assert mixing.weights[2] == {0: 0.25, 2: 0.25, 4: 0.5}
    assert mixing.weights[0] == {0: 0.25, 1: 0.25, 2: 0.25, 4: 0.25}
    one = OnePeerExponential().mixing(tuple(range(6)), 1, 0, {0, 1, 2, 4, 5})
    assert [one.in_neighbors(node) for node in range(6)] == [(2,), (5,), (4,), (), (0,), (1,)]


def test_a_gap_that_is_too_long_to_be_closed_breaks_its_cycle():
    members = tuple(range(30))
    shorter, longer = (OnePeerExponential().mixing(members, 0, 0, {*range(10), *range(last, 30)}) for last in (17, 18))
    assert shorter.in_neighbors(9) == (17,)
    assert longer.num_messages == 0


@pytest.mark.parametrize("num_nodes", [5, 7, 8, 9, 15, 16, 17])
@pytest.mark.parametrize("topology", [Exponential(), OnePeerExponential(), Ring()], ids=name)
def test_who_is_always_late_keeps_nobody_from_mixing(topology, num_nodes):
    members = tuple(range(num_nodes))
    present = [node for node in members if node != 4]
    product = np.eye(len(present))
    for number in range(topology.period(num_nodes)):
        matrix = topology.mixing(members, number, 0, frozenset(present)).matrix()
        product = matrix[np.ix_(present, present)] @ product
    left = np.linalg.norm(product - 1 / len(present), 2)
    assert left < (0.75 if topology.name != "ring" else 0.99)


def test_a_torus_whose_members_leave_is_the_nearest_grid():
    assert mix(Torus(rows=4, cols=4), 15) == mix(Torus(rows=3, cols=5), 15)
    assert mix(Torus(rows=4, cols=4), 13) == mix(Ring(), 13)


def test_a_degree_that_is_impossible_gives_way():
    degrees = [len(mix(RandomRegular(degree=5), n).in_neighbors(0)) for n in (1, 2, 3, 4, 5, 6, 7, 8)]
    assert degrees == [0, 1, 2, 3, 4, 5, 4, 5]


def test_the_pieces_of_a_sparse_graph_are_joined():
    mixing = mix(ErdosRenyi(probability=1e-9), 6)
    assert mixing.num_messages == 10
    assert mixing.rho < 1


def test_a_graph_that_is_never_connected_is_not_drawn_for_ever(monkeypatch):
    monkeypatch.setattr("starling.algorithms.topologies.random_regular.pieces", lambda *_: [[0], [1]])
    with pytest.raises(SettingsError, match="none of 100 graphs of 11 nodes with degree 4 is connected"):
        mix(RandomRegular(), 11, seed=12345)


# --- time, seeds, and what is kept ----------------------------------------------------------------------------------

RANDOM = [ErdosRenyi, BarabasiAlbert, RandomRegular]


@pytest.mark.parametrize("kind", RANDOM)
def test_a_random_graph_is_a_function_of_the_seed_and_the_draw(kind):
    static, redrawn = kind(), kind(redraw_every=3)
    assert len({frozenset(edges(mix(static, 20, seed=seed))) for seed in range(6)}) == 6
    assert mix(static, 20, 0) is mix(static, 20, 1000)
    graphs = [frozenset(edges(mix(redrawn, 20, number))) for number in range(9)]
    assert graphs[0] == graphs[2] == frozenset(edges(mix(static, 20)))
    assert graphs[3] == graphs[5]
    assert len(set(graphs)) == 3
    assert (static.period(20), redrawn.period(20)) == (1, None)


def test_random_graphs_are_the_same_everywhere():
    drawn = [sorted(edge for edge in edges(mix(kind(), 7)) if edge[0] < edge[1]) for kind in RANDOM]
    assert drawn == [
        [(0, 3), (1, 2), (1, 3), (1, 5), (2, 3), (3, 6), (4, 6)],
        [(0, 1), (0, 2), (0, 3), (0, 6), (1, 2), (1, 4), (2, 3), (2, 4), (2, 6), (3, 5), (4, 5)],
        [
            *[(0, 1), (0, 3), (0, 4), (0, 5), (1, 2), (1, 3), (1, 5)],
            *[(2, 4), (2, 5), (2, 6), (3, 4), (3, 6), (4, 6), (5, 6)],
        ],
    ]


def test_alternating_counts_the_rounds_of_each():
    topology = Alternating(topologies=(Ring(), OnePeerExponential()))
    assert [mix(topology, 8, number).in_neighbors(0) for number in range(6)] == [
        (1, 7),
        (1,),
        (1, 7),
        (2,),
        (1, 7),
        (4,),
    ]
    assert topology.period(8) == 6
    assert topology.num_messages(8, 0) == 16
    assert topology.num_messages(8, 1) == 8
    assert not topology.symmetric
    assert Alternating(topologies=(Ring(), Torus())).symmetric
    assert Alternating(topologies=(OnePeerExponential(), ErdosRenyi(redraw_every=1))).period(8) is None


def test_alternating_random_graphs_differ():
    topology = Alternating(topologies=(ErdosRenyi(), ErdosRenyi()))
    assert edges(mix(topology, 20, 0)) != edges(mix(topology, 20, 1))
    assert mix(topology, 20, 0) is mix(topology, 20, 2)


@pytest.mark.parametrize("topology", [topology for topology in ALL if topology.period(9) == 1], ids=name)
def test_what_was_built_is_kept(topology):
    members = tuple(range(9))
    first = topology.mixing(members, 0, 0)
    assert topology.mixing(list(members), 7, 0) is first
    assert topology.model_copy().mixing(members, 0, 0, set(members)) is first
    part = topology.mixing(members, 0, 0, {1, 2, 3, 4})
    assert part is not first
    assert topology.mixing(members, 8, 0, frozenset({1, 2, 3, 4})) is part


def test_what_is_kept_is_bounded():
    first = mix(Ring(), 9)
    for num_nodes in range(10, 60):
        mix(Ring(), num_nodes)
    again = mix(Ring(), 9)
    assert again is not first
    assert again == first


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "num_nodes", "message"),
    [
        (Torus(rows=4, cols=4), 15, "topology torus: 15 nodes are no grid of rows 4 × cols 4; 3 × 5 is one"),
        (Torus(cols=4), 15, "15 nodes are no grid of cols 4; 3 × 5 is one"),
        (Torus(), 7, "7 is prime; take 6 or 8 nodes, or topology ring"),
        (RandomRegular(degree=3), 7, "3 × 7 is odd, and every edge has two ends; take degree 2"),
        (RandomRegular(degree=4), 4, "degree 4 is impossible for N = 4: it must be less than N; take degree 3"),
        (RandomRegular(degree=1), 4, "pairs are not connected; take degree 2"),
        (RandomRegular(degree=4), 1, "take more nodes"),
        (BarabasiAlbert(num_edges=3), 3, "num_edges 3 needs at least 4 nodes, and there are 3"),
        (ErdosRenyi(probability=0.01), 50, "none is connected; set it to 0.098 or more"),
        (Alternating(topologies=(Ring(), Torus())), 7, "topology torus: 7"),
    ],
)
def test_graphs_that_do_not_exist(topology, num_nodes, message):
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        topology.validate_for(num_nodes)


@pytest.mark.parametrize("topology", ALL, ids=name)
def test_graphs_that_exist(topology):
    topology.validate_for(12)
    if not isinstance(topology, BarabasiAlbert | RandomRegular) and topology != Torus(rows=3):
        for num_nodes in (1, 2, 3, 4):
            topology.validate_for(num_nodes)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "ring", "degree": 2},
        {"name": "torus", "rows": 0},
        {"name": "erdos_renyi", "probability": 0},
        {"name": "erdos_renyi", "probability": 1.1},
        {"name": "barabasi_albert", "num_edges": 0},
        {"name": "random_regular", "redraw_every": -1},
        {"name": "alternating", "topologies": []},
        {"name": "alternating", "topologies": ["rong"]},
        {"name": "file"},
    ],
)
def test_fields_that_are_wrong(fields):
    with pytest.raises(ValidationError):
        Topology.model_validate(fields)


def test_symmetry_that_an_algorithm_needs():
    Ring().require_symmetric("gradient_tracking")
    Exponential().require_doubly_stochastic("dsgd")
    with pytest.raises(SettingsError, match="dadao needs symmetric weights, and topology exponential has a directed"):
        Exponential().require_symmetric("dadao")


def test_names():
    assert set(table(Topology)) == {topology.name for topology in ALL} | {"file"}
    for topology in ALL:
        assert Topology.model_validate(topology.model_dump()) == topology


# --- from a file ----------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path):
    """Write a file and make a topology of it."""

    def write(text: str, suffix: str = "txt", **fields) -> File:
        path = tmp_path / f"graph.{suffix}"
        path.write_text(text)
        return File(path=str(path), **fields)

    return write


PATH = "0 1 0.25\n1 2 0.5\n"
CYCLES = "0 1 0.4\n1 2 0.4\n2 0 0.4\n2 3 0.2\n3 2 0.2\n"
"""A directed triangle, and one edge there and back."""


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        (PATH, "txt"),
        ("# mine\n\n0,1,0.25\n 2 , 1 , 5e-1  # the other way round\n2 2 .5\n", "csv"),
        ("[[0, 1, 0.25], [1, 2, 0.5]]", "json"),
    ],
)
def test_given_weights_are_used_as_they_are(written, text, suffix):
    mixing = mix(written(text, suffix), 3)
    assert mixing.matrix().tolist() == [[0.75, 0.25, 0], [0.25, 0.25, 0.5], [0, 0.5, 0.5]]


def test_lost_weight_goes_to_both_ends(written):
    mixing = written(PATH).mixing((0, 1, 2), 0, 0, {0, 1})
    assert mixing.weights == {0: {0: 0.75, 1: 0.25}, 1: {0: 0.25, 1: 0.75}, 2: {2: 1.0}}


def test_without_weights_the_rule_holds_on_what_is_left(written):
    topology = written("0 1\n1 2\n1 3\n")
    assert mix(topology, 4).weights[1] == {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}
    left = topology.mixing((0, 1, 2, 3), 0, 0, {0, 1, 2})
    assert left.weights[0] == pytest.approx({0: 2 / 3, 1: 1 / 3})
    assert topology.symmetric


def test_directed_weights(written):
    topology = written(CYCLES, directed=True)
    assert not topology.symmetric
    assert topology.doubly_stochastic
    mixing = mix(topology, 4)
    assert mixing.weights[1] == {0: 0.4, 1: 0.6}  # what 0 sends to 1, 1 mixes
    assert mixing.weights[2] == pytest.approx({1: 0.4, 2: 0.4, 3: 0.2})
    without = topology.mixing((0, 1, 2, 3), 0, 0, {1, 2, 3})
    assert without.matrix().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.8, 0.2], [0, 0, 0.2, 0.8]]


def test_weights_that_do_not_preserve_the_mean(written):
    text = "0 1\n1 2\n2 0\n0 2\n"
    with pytest.raises(
        ValidationError, match=r"node 0's values are mixed sum to 1\.33333, not to 1.*allow_row_stochastic"
    ):
        written(text, directed=True)
    topology = written(text, directed=True, allow_row_stochastic=True)
    assert not topology.doubly_stochastic
    mixing = mix(topology, 3)
    assert mixing.weights[2] == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3})
    assert not mixing.is_doubly_stochastic
    with pytest.raises(
        SettingsError, match="dsgd needs doubly stochastic weights, and those of topology file are row-"
    ):
        topology.require_doubly_stochastic("dsgd")
    left = topology.mixing((0, 1, 2), 0, 0, {0, 2})
    assert left.matrix() == pytest.approx(np.array([[0.5, 0, 0.5], [0, 1, 0], [1 / 3, 0, 2 / 3]]))


def test_members_sit_at_their_own_place_and_newcomers_at_free_ones(written):
    topology = written("0 1\n1 2\n2 3\n")
    assert edges(topology.mixing((0, 2, 3), 0, 0)) == {(2, 3), (3, 2)}
    assert edges(topology.mixing((0, 2, 3, 9), 0, 0)) == {(0, 9), (9, 0), (9, 2), (2, 9), (2, 3), (3, 2)}
    assert topology.mixing((0, 1, 2, 3, 9), 0, 0).weights[9] == {9: 1.0}
    assert edges(topology.mixing((11, 12, 13, 14), 0, 0)) == {(i + 11, j + 11) for i, j in edges(mix(topology, 4))}
    topology.validate_for(4)
    with pytest.raises(SettingsError, match="is a graph of 4 nodes, and there are 5"):
        topology.validate_for(5)


def test_one_node_in_a_file(written):
    assert mix(written("0 0 1\n"), 1).weights == {0: {0: 1.0}}


def test_the_graph_travels_with_the_topology(written):
    topology = written(PATH)
    sent = pickle.dumps(topology)
    Path(topology.path).unlink()
    received = pickle.loads(sent)
    assert received == topology
    assert mix(received, 3) == mix(topology, 3)


def test_a_file_that_was_changed_is_another_topology(written):
    first = written(PATH)
    second = written("0 1 0.5\n1 2 0.25\n")
    assert first.path == second.path
    assert first != second
    assert mix(first, 3) != mix(second, 3)


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("0 1\n1 two\n", "txt", "graph.txt, line 2: '1 two' is no edge; write two node numbers, and perhaps a weight"),
        ("0 1 0.5 {}\n", "txt", "line 1: '0 1 0.5 {}' is no edge"),
        ("0\n", "txt", "line 1: '0' is no edge"),
        ("0 -1\n", "txt", "line 1: '0 -1' is no edge"),
        ("0 1 nan\n", "txt", "line 1: a weight must be above 0 and at most 1, got nan"),
        ("0 1 -0.1\n", "txt", "line 1: a weight must be above 0 and at most 1, got -0.1"),
        ("0 1\n1 0\n", "txt", "line 2: the edge 1 0 is there already; each edge of an undirected graph"),
        ("# nothing\n", "txt", "has no edges"),
        ("0 1 0.5\n1 2\n", "txt", "some edges have a weight, and some have none"),
        ("1 2\n2 3\n", "txt", "names 3 nodes, but not node 0; number them 0 to 2"),
        ("0 1\n2 3\n", "txt", "the graph is not connected: no path leads from node 0 to node 2"),
        ("0 1\n1 1\n", "txt", "an edge of node 1 to itself says nothing without weights"),
        ("0 1 0.5\n1 2 0.6\n", "txt", "the weights that node 1 gives to others' values sum to 1.1; it must be less"),
        ("0 1 1\n", "txt", "the weights that node 0 gives to others' values sum to 1;"),
        (
            "0 1 0.5\n0 0 0.4\n",
            "txt",
            "the weights of node 0 sum to 0.9, and not to 1; without a line 0 0 it keeps 0.5",
        ),
        ("[[0, 1], [1, 2]", "json", "graph.json, line 1: is not JSON"),
        ("[[0, 1], [1, 2.5]]", "json", "graph.json, edge 2: '1 2.5' is no edge"),
        ('{"edges": [[0, 1]]}', "json", "graph.json, edge 1: "),
        ("[3]", "json", "edge 1: '3' is no edge"),
    ],
)
def test_files_that_are_refused(written, text, suffix, message):
    with pytest.raises(ValidationError) as caught:
        written(text, suffix)
    (error,) = caught.value.errors()
    assert message in error["msg"]
    assert "\n" not in error["msg"]


def test_directed_files_that_are_refused(written):
    with pytest.raises(ValidationError, match="no path leads from node 2 to node 0"):
        written("0 1\n1 0\n1 2\n", directed=True)
    with pytest.raises(ValidationError, match=r"line 3: the edge 0 1 is there already \["):
        written("0 1\n1 0\n0 1\n", directed=True)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ValidationError, match="nope: cannot be read: No such file"):
        File(path=str(tmp_path / "nope"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValidationError, match="cannot be read: it is not text"):
        File(path=str(tmp_path / "binary"))


@given(
    permutations=st.lists(st.permutations(range(7)), min_size=1, max_size=4),
    missing=st.sets(st.integers(0, 6)),
)
def test_flows_without_some_stay_flows(permutations, missing):
    share = 0.9 / len(permutations)
    arcs: dict[int, dict[int, float]] = {node: {} for node in range(7)}
    for permutation in permutations:
        for node, other in enumerate(permutation):
            if node != other:
                arcs[node][other] = arcs[node].get(other, 0.0) + share
    kept = cycles_without(arcs, missing)
    into = dict.fromkeys(range(7), 0.0)
    for node, row in kept.items():
        for other, weight in row.items():
            assert not missing & {node, other}
            assert 0 < weight <= arcs[node][other] + 1e-12
            into[other] += weight
    for node, row in kept.items():
        assert sum(row.values()) == pytest.approx(into[node], abs=1e-14)
    if not missing:
        assert kept == {node: pytest.approx(row, abs=1e-8) for node, row in arcs.items()}


def test_symmetric_weights_lose_only_the_edges_of_who_is_missing():
    arcs = {node: dict.fromkeys(mix(Torus(), 12).in_neighbors(node), 0.2) for node in range(12)}
    kept = cycles_without(arcs, {5})
    assert kept == {
        node: {other: 0.2 for other in row if 5 not in (node, other)} if node != 5 else {} for node, row in arcs.items()
    }


def test_pairs_of_a_matching_are_others_in_each_round_and_each_run():
    of_rounds = {str(RandomMatching().mixing(range(8), number, 0).weights) for number in range(5)}
    of_runs = {str(RandomMatching().mixing(range(8), 0, seed).weights) for seed in range(5)}
    assert min(len(of_rounds), len(of_runs)) > 1
