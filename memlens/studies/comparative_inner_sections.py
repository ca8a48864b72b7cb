"""The report on what goes on inside: noise, middle layers, heads, and signatures of families."""

from __future__ import annotations

import pandas as pd

from memlens.errors import ResultError
from memlens.figures import curves_by_family, model_dots, similarity_map
from memlens.studies import comparative_head_tables as of_heads
from memlens.studies import comparative_inside as inside
from memlens.studies.comparative_measure import CONTROL, MEMORIZED
from memlens.studies.comparative_profiles import FamilyTest, cluster, family_test
from memlens.studies.comparative_sections import Sections, largest_of_families
from memlens.studies.statistics import Estimate

__all__ = ["InnerSections"]


class InnerSections(Sections):
    """The parts on what is recalled, and on what goes on inside."""

    signature: Estimate | None = None
    tests: dict[str, FamilyTest]

    def noise(self) -> None:
        """Part 5: perturbation and recovery."""
        options, folder = self.options, self.folder
        table = self.keep(
            "noise",
            inside.noises(self.models, options),
            "Recall under noise",
            "noise",
            "leading: share of the continuation that is right from its start, which M is at least; accuracy, "
            "below_half, between and all_right are teacher-forced, which M is mostly below between its ends; "
            "all_right is exact.",
        )
        if len(table):
            curves = table.rename(columns={"rate": "mean"})
            folder.add_figure(
                "noise",
                curves_by_family(
                    curves,
                    "alpha",
                    title="Rate under noise",
                    x_title="strength of the noise",
                    y_title="share recalled exactly",
                ),
                section="noise",
                reading="Relative Gaussian noise in the residual at the prompt.",
            )
            self.keep(
                "structural_noise",
                inside.structural_changes(self.models, options),
                "Structural share under the strongest noise minus without",
                "noise",
            )
        recovery = self.keep(
            "recovery",
            inside.recoveries(self.models, options.seed),
            "Similarity regained",
            "noise",
            "R = similarity after the last block - right after the noise",
        )
        if not len(recovery):
            self.say("noise", "No model has enough memorized sequences to measure recovery on.")
            return
        self.keep(
            "recovery_gaps",
            inside.gaps(self.models, options.seed),
            "Memorized minus matched controls",
            "noise",
        )
        strongest = max(options.alphas)
        curves = self.keep(
            "similarity", inside.similarities(self.models, strongest, options), "Similarity by layer", "noise"
        )
        shown = curves.loc[curves["group"].isin([MEMORIZED, CONTROL])]
        folder.add_figure(
            "similarity",
            curves_by_family(
                largest_of_families(shown, self.models),
                "depth",
                dash="group",
                title="Recovery from noise",
                subtitle=f"alpha = {strongest:g}; the largest model of each family",
                x_title="relative depth",
                y_title="similarity to the clean residual",
            ),
            section="noise",
            reading="A line that rises takes the noise out again.",
        )

    def layers(self) -> None:
        """Part 6: decoding middle layers."""
        options, folder = self.options, self.folder
        curves = self.keep(
            "decoding", inside.decodings(self.models, options), "Decoding probability by layer", "layers"
        )
        if not len(curves):
            self.say("layers", "No model has enough memorized sequences to decode.")
            return
        self.keep(
            "bursts",
            inside.bursts(self.models, options),
            "Where the probability of the true token bursts",
            "layers",
            "burst: relative depth of the block with the largest rise; crossing: of the first above 1/2",
        )
        shown = curves.loc[(curves["token"] == "true") & curves["group"].isin([MEMORIZED, CONTROL])]
        folder.add_figure(
            "decoding",
            curves_by_family(
                shown,
                "depth",
                dash="group",
                title="Decoding middle layers",
                subtitle="logit lens, probability of the true token",
                x_title="relative depth",
                y_title="mean probability",
            ),
            section="layers",
            reading="Solid: memorized sequences; dotted: matched controls.",
        )

    def heads(self) -> None:
        """Part 7: heads."""
        options, folder = self.options, self.folder
        table = self.keep(
            "head_overlap",
            of_heads.overlaps(self.models, options),
            "How far important heads are shared",
            "heads",
            "Every statistic beside its nulls; exact is the mean of two (or all) independent random sets.",
        )
        self.keep(
            "heads",
            of_heads.heads(self.models, options),
            "The most important heads",
            "heads",
            f"importance: loss of {options.importance} when the head is replaced ({options.head_mode}); "
            "sets: domains in whose set it is",
        )
        self.keep(
            "importance_agreement",
            of_heads.importance_agreement(self.models, options),
            "Does another metric rank heads alike?",
            "heads",
        )
        if not len(table):
            self.say("heads", "No model has two domains with enough memorized sequences to compare heads.")
            return
        self.keep(
            "head_pairs", of_heads.head_pairs(self.models, options), "Overlap of every two domains", "heads"
        )
        self.keep(
            "universal_heads",
            of_heads.universal_heads(self.models, options),
            "Heads important in every domain",
            "heads",
        )
        chosen = table[
            (table["null"] == "heads anywhere")
            & table["statistic"].isin(["across domains", "inside a domain"])
        ]
        dots = chosen.assign(mean=chosen["value"], kind=chosen["statistic"])
        folder.add_figure(
            "head_overlap",
            model_dots(
                dots, x_title="Jaccard overlap", reference="exact", title="Overlap of important heads"
            ),
            section="heads",
            reading="Inside a domain: of two halves of its sequences. Gray: what random sets give.",
        )

    def signatures(self) -> None:
        """Part 8: profiles over depth, and whether they give the family away."""
        options = self.options
        self.tests = {}
        for part in ("heads", "heads_untrained"):
            found = of_heads.profiles_of(self.members, options, part)
            name = "families" if part == "heads" else "untrained"
            if part == "heads":
                self._profiles(found)
            try:
                self.tests[name] = family_test(
                    found.similarity,
                    found.labels,
                    found.families,
                    n_permutations=options.n_permutations,
                    seed=options.seed,
                )
            except ResultError as error:
                if part == "heads":
                    self.say("signatures", str(error))
                continue
            title = "Can the family be told from the profile?" + (
                " (untrained twins)" if name == "untrained" else ""
            )
            self.keep(
                f"family_test_{name}",
                self.tests[name].table,
                title,
                "signatures",
                "null: family labels shuffled",
            )
            if part == "heads":
                self.signature = found.within_minus_across()
                self.keep("family_predicted", self.tests[name].predicted, "Left out one by one", "signatures")

    def _profiles(self, found: of_heads.Profiles) -> None:
        if not len(found.by_layer):
            return
        folder = self.folder
        self.keep(
            "profiles",
            found.by_layer,
            "Importance by layer",
            "signatures",
            f"profile: {self.options.profile}; sums to 1",
        )
        folder.add_figure(
            "profiles",
            curves_by_family(
                found.by_layer,
                "depth",
                title="Where important heads stand",
                x_title="relative depth",
                y_title="share of importance",
            ),
            section="signatures",
            reading="Each model's profile sums to 1 over its own layers.",
        )
        if len(found.labels) < 2:
            return
        pairs = pd.DataFrame(found.similarity, columns=found.labels)
        self.keep(
            "profile_similarity",
            pairs.assign(model=found.labels).loc[:, ["model", *found.labels]],
            "Similarity of all pairs",
            "signatures",
        )
        merges, order = cluster(found.similarity, self.options.linkage)
        folder.add_figure(
            "profile_similarity",
            similarity_map(
                found.similarity,
                found.labels,
                merges,
                order,
                title="How alike profiles are",
                subtitle=f"{self.options.similarity} of profiles; clustering: {self.options.linkage} linkage",
            ),
            section="signatures",
            reading="Bright: alike. Above: which models are joined first.",
        )
