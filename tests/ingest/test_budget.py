from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.budget import ByteBudget

LIMIT = 1000
READ = 250


class Body:
    """Arrives in reads while it is not paused."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.charged = 0
        self.paused = False

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False


@settings(max_examples=300)
@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=30),
    st.integers(1, 10),
    st.randoms(use_true_random=False),
)
def test_bodies_stay_within_the_limit_and_never_stand_still(sizes: list[int], at_once: int, random):  # type: ignore[no-untyped-def]
    """Whatever comes first, and whenever bodies are used: something can always go on until all are done."""
    told: list[None] = []
    budget = ByteBudget(LIMIT, lambda: told.append(None))
    asked: list[Body] = []
    whole: list[Body] = []
    waiting = [Body(size) for size in sizes]
    while waiting or asked or whole:
        may: list[tuple[str, Body]] = [("read", body) for body in asked if not body.paused]
        may += [("use", body) for body in whole]
        if waiting and budget.has_room and len(asked) < at_once:
            may.append(("ask", waiting[0]))
        assert may, "everybody waits for everybody"
        step, body = random.choice(may)
        lacked, calls = (not budget.has_room, budget.has_plenty), len(told)
        if step == "ask":
            asked.append(waiting.pop(0))
            budget.begin(body)
        elif step == "use":
            whole.remove(body)
            budget.give_back(body.charged)
        else:
            size = min(READ, body.left)
            body.left -= size
            body.charged += size
            budget.take(body, size)
            if not body.left:
                asked.remove(body)
                whole.append(body)
                budget.arrived(body)
        assert budget.used == sum(body.charged for body in asked + whole)
        better = any(
            before and not after for before, after in zip(lacked, (not budget.has_room, budget.has_plenty), strict=True)
        )
        assert len(told) - calls == better, "whoever waits for room, or for an end of plenty, is told so once"
        assert budget.used <= LIMIT + READ + max(sizes)
    assert budget.used == 0 and budget.has_room and not budget.has_plenty
