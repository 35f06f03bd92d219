"""Judging and rewriting: every rule looks at every site, and what matches and pays is built, certified, and put in.

Rules run in their registered order. What a rule leaves behind is recognised again before the next rule looks, so rules
compose without knowing one another; a rule that finds its site gone is told which one took it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
from torch import fx

from .axes import same_size
from .certify import Certificate, Comparison
from .emit import Emitter, Session
from .layouts import is_tensor, shape_of
from .masks.prove import MaskReader
from .mutations import Mutations, base_of
from .options import Options
from .provenance import source_line
from .recognise import recognise_at
from .regions import Regions, cut_out
from .registry import ALL, RewriteEntry, rewrites
from .rules import Match, Refusal, Rewrite, Verdict
from .sites import AttentionSite

log = logging.getLogger(__name__)


class RewriteFailed(RuntimeError):
    """A rule raised, or its certificate did not hold, and `strict` is set."""


@dataclass(frozen=True)
class Rewritten:
    """The verdict of every rule at every site, and the certificates by signature."""

    verdicts: tuple[Verdict, ...]
    certificates: Mapping[str, Certificate]
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What each rewrite took, certificates included."""


def rewrite_graph(
    graph: fx.Graph,
    sites: Sequence[AttentionSite],
    options: Options,
    hints: Mapping[sympy.Symbol, int],
    regions: dict[str, Regions] | None = None,
) -> Rewritten:
    """Apply the rules that `options` allow, in place. `regions` receives what certificates compare, by their names."""
    run = _Run(graph, list(sites), options, hints, regions)
    seconds: dict[str, float] = {}
    for entry in rewrites():
        start = time.perf_counter()
        if options.rewrites is not None and entry.name not in options.rewrites:
            run.all(entry, "off", "not among the rewrites asked for")
        elif options.rewrites is None and not entry.exact:
            run.all(entry, "off", "it is lossy and was not asked for")
        else:
            for index in range(len(sites)):
                run.one(entry, index)
        seconds[entry.name] = time.perf_counter() - start
        log.debug("%s: %.3f s", entry.name, seconds[entry.name])
    return Rewritten(tuple(run.verdicts), run.certificates, seconds)


class _Run:
    """The state of one graph's rewriting."""

    def __init__(
        self,
        graph: fx.Graph,
        sites: list[AttentionSite],
        options: Options,
        hints: Mapping[sympy.Symbol, int],
        regions: dict[str, Regions] | None,
    ) -> None:
        self.graph, self.options, self.hints, self.regions = graph, options, hints, regions
        self.current: list[AttentionSite | None] = list(sites)
        self.taken_by: dict[int, RewriteEntry] = {}
        self.session = Session(written=lambda node: base_of(node) in self.mutations.writes)
        self.mutations = Mutations.of(graph)
        self.reader = MaskReader(graph)
        self.verdicts: list[Verdict] = []
        self.fuel: float = float("inf") if options.fuel is None else options.fuel
        self.certificates: dict[str, Certificate] = {}

    def all(self, entry: RewriteEntry, outcome: str, reason: str) -> None:
        for index in range(len(self.current)):
            self.verdicts.append(Verdict(index, entry.name, outcome, reason))  # type: ignore[arg-type]

    def one(self, entry: RewriteEntry, index: int) -> None:
        """Judge and, if it matches, apply one rule at one site."""
        site = self.current[index]
        if site is None:
            taken = self.taken_by[index]
            rivals = ALL in entry.before and ALL in taken.before and taken.name not in entry.after
            advice = "; both ask to run first: order them with before or after" if rivals else ""
            self.verdicts.append(Verdict(index, entry.name, "refused", f"{taken.name} took the site{advice}"))
            return
        if not self.fuel:
            self.verdicts.append(Verdict(index, entry.name, "off", "no fuel left"))
            return
        verdict = Verdict(index, entry.name, "refused", line=str(source_line(site.anchor) or ""))
        try:
            verdict = self._judge(entry, entry.make(), site, index, verdict)
        except Exception as error:
            if self.options.strict:
                raise RewriteFailed(f"{entry.name} at {verdict.line}: {type(error).__name__}: {error}") from error
            log.warning("rewrite %s failed at %s: %s: %s", entry.name, verdict.line, type(error).__name__, error)
            verdict = replace(verdict, outcome="failed", reason=f"{type(error).__name__}: {error}")
        self.verdicts.append(verdict)

    def _judge(self, entry: RewriteEntry, rule: Rewrite, site: AttentionSite, index: int, verdict: Verdict) -> Verdict:
        splits, sums = dict(site.space.splits), dict(site.space.sums)
        answer = rule.match(site)
        if isinstance(answer, Refusal):  # what it learned about the axes on the way is forgotten
            site.space.splits, site.space.sums = splits, sums
            return self._refuse(verdict, answer)
        benefit = rule.benefit(answer)
        verdict = replace(verdict, estimate=benefit.at(self.hints))
        if not benefit.pays(self.hints):
            return replace(verdict, outcome="not paying", reason="as many bytes move as before")
        if (refusal := self._written_between(site, answer)) is not None:
            return self._refuse(verdict, refusal)
        emit = Emitter.at(site, entry.name, self.session)
        try:
            new = rule.build(answer, emit)
            if not isinstance(new, fx.Node) or not is_tensor(new):
                raise ValueError(f"build returned {new!r}, which is no node of a tensor")
            certificate = self._certify(entry, answer, new, emit)
            if certificate is None or certificate.holds:
                _check_form(new, site.output)
        except Exception:
            emit.discard()
            raise
        if certificate is not None and not certificate.holds:
            emit.discard()
            reason = f"its certificate does not hold: relative error {certificate.error:.1e} {certificate.note}".strip()
            if self.options.strict:
                raise RewriteFailed(f"{entry.name} at {verdict.line}: {reason}")
            log.warning("rewrite %s undone at %s: %s", entry.name, verdict.line, reason)
            return replace(
                verdict, outcome="undone", reason=reason, error=certificate.error, certificate=certificate.name
            )
        if self.regions is not None and certificate is not None and certificate.name not in self.regions:
            self.regions[certificate.name] = cut_out(Comparison.of(site.output, new, emit.behind(new), ()))
        emit.replaces(site.region)
        site.output.replace_all_uses_with(new, propagate_meta=False)
        replaced = self.session.replaced
        replaced.update({old: new for old, now in replaced.items() if now is site.output})
        replaced[site.output] = new
        self._recognise_again(entry, index, emit)
        self.fuel -= 1
        verdict = replace(verdict, outcome="applied", certificate=certificate.name if certificate else "")
        if certificate is None or not certificate.compared:
            return replace(verdict, reason=certificate.note if certificate else "")
        return replace(verdict, error=certificate.error)

    def _refuse(self, verdict: Verdict, refusal: Refusal) -> Verdict:
        line = source_line(refusal.node) if refusal.node is not None else None
        return replace(verdict, outcome="refused", reason=refusal.reason, line=str(line or verdict.line))

    def _certify(self, entry: RewriteEntry, match: Match, new: fx.Node, emit: Emitter) -> Certificate | None:
        if self.options.verify == "off" or not entry.exact:
            return None
        comparison = Comparison.of(match.site.output, new, emit.behind(new), match.evaluate)
        key = f"{entry.name} {comparison.signature}"
        if key not in self.certificates or self.options.verify == "full":
            self.certificates[key] = replace(comparison.run(), name=key)
        return self.certificates[key]

    def _written_between(self, site: AttentionSite, match: Match) -> Refusal | None:
        """A write to what the site reads or computes, after it is first read and before the output.

        The replacement reads everything at the output's place. Views of an operand read nothing: they see what was
        written to it until the first step that copies it, or the attention, reads them.
        """
        reads = [("a tensor it reads is", *read) for read in match.reads]
        named = [("the query is", t.query) for t in site.terms] + [("the key is", t.key) for t in site.terms]
        for name, operand in (*named, ("the value is", site.value)):
            base = self.mutations.base_of(operand.root)
            copies = (node for node, _ in reversed(operand.chain) if self.mutations.base_of(node) is not base)
            reads.append((name, operand.root, next(copies, site.region[0])))
        for step in (*site.steps, *site.weight_steps):
            reads += [
                ("a mask or a bias is", node, step.node)
                for node in step.node.all_input_nodes
                if node not in site.region
            ]
        if site.call is not None and site.call.mask is not None:
            reads.append(("the mask is", site.call.mask, site.anchor))
        reads += [("the scores are" if node < site.anchor else "the weights are", node, node) for node in site.region]
        for name, tensor, first in reads:
            write = self.mutations.write_between(tensor, first, site.output)
            if write is not None and write not in site.region:
                return Refusal(f"{name} written in between", write)
        return None

    def _recognise_again(self, entry: RewriteEntry, index: int, emit: Emitter) -> None:
        for node in emit.nodes:
            found = recognise_at(node, self.reader)
            if isinstance(found, AttentionSite):
                self.current[index] = found
                return
        self.current[index] = None
        self.taken_by[index] = entry


def _check_form(new: fx.Node, output: fx.Node) -> None:
    """Raise ValueError unless a tensor has the shape and dtype of the output in whose place it shall stand."""
    given, wanted = new.meta["val"], output.meta["val"]
    same = len(given.shape) == len(wanted.shape) and all(map(same_size, shape_of(new), shape_of(output)))
    if not same or given.dtype != wanted.dtype:
        raise ValueError(
            f"build returned {given.dtype} {tuple(given.shape)} for an output of {wanted.dtype} {tuple(wanted.shape)}"
        )
