"""What a seed has always given, by every method: a seed in a paper is worth what it gives in a later version."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sedd_samplers import (
    Ancestral,
    ByConfidence,
    ConfidenceUnmasking,
    EntropyBoundRenoising,
    Euler,
    FirstHitting,
    LeaveOneOut,
    Looped,
    Particles,
    PathPlanning,
    PredictorCorrector,
    Psi,
    Remasking,
    TauLeaping,
    Trapezoidal,
    Tweedie,
    Uniformization,
    Unmasking,
    at_rate,
    capped,
    clamped,
    confidence,
    entropy,
    entropy_bound,
    generate,
    infill,
    margin,
    random_order,
    rescaled,
    sample,
    threshold,
    when_still,
)
from sedd_samplers.controls import controlled, min_p, repetition_penalty, temperature, top_k, top_p


def lively(x, sigma):
    """A score that belongs to no distribution, depends on the whole sequence and grows like 1 / sigma."""
    near = torch.roll(x, 1, 1) + 2 * torch.roll(x, -1, 1)
    wave = torch.sin(near[..., None] + torch.arange(6).double() + 0.7 * x.sum(1)[:, None, None])
    return wave - torch.log(torch.expm1(sigma.double()))[:, None, None] - 1.6


def logits(x, sigma):
    return 3 * torch.cos(1.3 * x.sum(1)[:, None, None] + x[..., None] * torch.arange(6).double())


MASKS: dict[str, Any] = {
    "unmasking": Unmasking(),
    "first hitting": FirstHitting(),
    "remasking, capped": Remasking(capped(0.3)),
    "remasking, rescaled": Remasking(rescaled(0.5)),
    "remasking at a rate": Remasking(at_rate(2.0)),
    "confidence": ConfidenceUnmasking(),
    "entropy": ConfidenceUnmasking(entropy),
    "margin": ConfidenceUnmasking(margin),
    "any order": ConfidenceUnmasking(random_order),
    "confidence, disturbed": ConfidenceUnmasking(confidence, randomness=2.0),
    "confidence, of two": ConfidenceUnmasking(controls=(top_k(2), temperature(1.5))),
    "threshold": ConfidenceUnmasking(rule=threshold(0.45)),
    "entropy bound": ConfidenceUnmasking(entropy, rule=entropy_bound(1.2)),
    "by confidence": ByConfidence(capped(0.4)),
    "path planning": PathPlanning(logits, 0.8),
    "path planning, draft": PathPlanning(logits, 1.2, reads_draft=True, controls=(top_p(0.8),)),
}
ANY: dict[str, Any] = {
    "Euler": Euler(),
    "tau-leaping": TauLeaping(),
    "Tweedie": Tweedie(),
    "ancestral": Ancestral(),
    "trapezoidal": Trapezoidal(),
    "trapezoidal, late": Trapezoidal(0.8),
    "uniformization": Uniformization(slack=3.0),
    "corrected": PredictorCorrector(),
    "corrected twice": PredictorCorrector(Trapezoidal(), corrections=2, ratio=0.3),
    "superposition": Psi(),
    "superposition, half": Psi(lambda t: t / 2),
}
NOISED: dict[str, Any] = {
    "one out": LeaveOneOut(share=0.3, corrections=2),
    "renoising": EntropyBoundRenoising(1.5, confident=1.2),
}
CONTROLLED: dict[str, Any] = {
    "hot": temperature(1.7),
    "of three": top_k(3),
    "most": top_p(0.7),
    "not rare": min_p(0.4),
    "once": repetition_penalty(3.0),
}


def run(ref, name):
    """8 sequences of 12 positions, of which the first two are given in every second."""
    masks, uniform = ref.StructuredAbsorbing(5, 2), ref.StructuredUniform(6)
    rows, rng = torch.arange(8), torch.Generator().manual_seed(0)
    x = torch.tensor([0, 1, 3, 4, 5])[torch.randint(5, (8, 12), generator=rng)]
    given = (rows[:, None] % 2 == 1) & (torch.arange(12) < 2)
    how: dict[str, Any] = {"x": x, "given": given, "steps": 5, "t_min": 0.01, "seeds": (7 * rows - 9).tolist()}
    noise = ref.Linear(3.0)
    kind, _, of = name.partition(": ")
    if kind == "masks":
        return infill(lively, masks, noise, method={**MASKS, **ANY}[of], **how)
    if kind == "noised":
        return infill(lively, uniform, noise, method={**NOISED, **ANY}[of], conditioning=clamped, **how)
    if kind == "controlled":
        return infill(controlled(lively, masks, CONTROLLED[of]), masks, noise, **how)
    if kind == "particles":
        graph = ref.hybrid_matrix(5) if of == "hybrid" else uniform
        return infill(lively, graph, noise, conditioning=Particles(4), **how | {"x": x.clamp(max=4)})
    if kind == "blocks":
        how |= {"block_size": 5, "origin": 1, "end_id": 4, "pad_id": 0, "growing": of == "growing"}
        return generate(lively, masks, noise, method=ConfidenceUnmasking(), **how).x
    if of == "loop":
        looped = Looped(noise, at=0.3, on=0.61, off=0.19)
        return infill(lively, masks, looped, method=Remasking(when_still(0.3)), **how | {"steps": 9})
    return sample(lively, masks, noise, shape=(8, 12), steps=5, t_min=0.0, generator=rng)


NAMES = [
    *(f"masks: {of}" for of in {**MASKS, **ANY}),
    *(f"noised: {of}" for of in {**NOISED, **ANY}),
    *(f"controlled: {of}" for of in CONTROLLED),
    *("particles: hybrid", "particles: uniform", "blocks: growing", "blocks: in a canvas", "else: loop"),
    "else: generator",
]
KNOWN = {
    "masks: unmasking": (
        "110530505053 155153041113 455334301341 355111055100 545305341334 514310033533 343115403514 540303001505"
    ),
    "masks: first hitting": (
        "155355451331 155304543301 513140451004 350440345411 044405555443 511100135033 433513131131 545501151540"
    ),
    "masks: remasking, capped": (
        "334330131500 151153053541 514141344553 351144433400 033005554354 514130113403 443540454041 540131141030"
    ),
    "masks: remasking, rescaled": (
        "013543340311 154541053541 134530003451 350341344400 045035014051 514441033304 331530454043 541343330010"
    ),
    "masks: remasking at a rate": (
        "410303433340 155155053141 540130334450 355313355331 540335144300 510411141414 441540414004 541431430010"
    ),
    "masks: confidence": (
        "344531433313 151435313550 144005131054 351154110410 544104351540 513143011133 103145504044 543151341511"
    ),
    "masks: entropy": (
        "435031415110 151311314540 015305133033 350134033430 343511135514 515131133101 033005511140 543151341001"
    ),
    "masks: margin": (
        "315533415100 150431343553 015305133033 353101043430 054504305510 514114353441 303035101445 543151341001"
    ),
    "masks: any order": (
        "315533415133 150000345150 333105135133 351141313115 043505405510 513313151445 343345500443 543041503143"
    ),
    "masks: confidence, disturbed": (
        "413015304045 150405144533 134401044303 350514051534 433100404540 513011334401 143503535033 544143450403"
    ),
    "masks: confidence, of two": (
        "114333304003 153313413133 103435430400 350131314100 150410301440 513143010133 403345103531 543151341441"
    ),
    "masks: threshold": (
        "344531433313 151435313550 144005131054 353111011133 544104351540 513411011143 103145504044 541111141111"
    ),
    "masks: entropy bound": (
        "435031415110 151311314540 015305133033 350134033430 343511135514 515131133101 033005511140 543151341001"
    ),
    "masks: by confidence": (
        "543035454505 153103441553 430534305440 355111055110 543401314535 514410014103 300155403331 541340503501"
    ),
    "masks: path planning": (
        "534344151010 153031034314 141014444030 355334301013 044054104110 513331533443 131155511355 540411331303"
    ),
    "masks: path planning, draft": (
        "303103141135 150044555030 541501413313 355535101111 014054403104 515341544134 115455315345 540310344334"
    ),
    "masks: Euler": (
        "111403033313 150443454514 313014333143 351303054410 050311004144 513110313354 305315451545 540343011000"
    ),
    "masks: tau-leaping": (
        "311313113314 151433454533 314034113030 351343054410 040311304303 513141300144 105315444545 540441141031"
    ),
    "masks: Tweedie": (
        "511131344401 151543555510 415134504144 350414004533 154401334134 514113113435 335444550545 540414011010"
    ),
    "masks: ancestral": (
        "100113053413 151443554534 414054433031 351303054410 050311004343 513113113434 305305453545 540414011010"
    ),
    "masks: trapezoidal": (
        "014531504051 155304334455 344541353443 354443054404 333333443113 513130335331 131013415511 541101111005"
    ),
    "masks: trapezoidal, late": (
        "145543403041 151314335435 443551345333 355534053313 143335344334 513430441133 313340404500 540101141005"
    ),
    "masks: uniformization": (
        "045103314500 153351405501 513343033533 351303154514 144051405345 513404331154 401341004433 545340000554"
    ),
    "masks: corrected": (
        "135000404451 153445441553 014431434501 355133310011 510314353105 514351014434 410301403441 543403111103"
    ),
    "masks: corrected twice": (
        "514301304100 155414451440 141143113541 351131035553 334533354515 510055115344 451443144343 541455445143"
    ),
    "masks: superposition": (
        "100113053413 151443554534 414054433031 351303054410 050311004343 513113113434 305305453545 540414011010"
    ),
    "masks: superposition, half": (
        "411133134005 153533554513 434054435143 350414451533 044050004111 514103333333 335315554514 540313150000"
    ),
    "noised: one out": (
        "005041010333 153210501432 322305214505 351512423431 454224334022 514222551534 443001350210 543303114101"
    ),
    "noised: renoising": (
        "320143033053 151220255230 425241531200 354414554453 101243232405 512351422334 434355434225 540041311230"
    ),
    "noised: Euler": (
        "320143033044 151520355530 425242531250 355414254413 400213232405 512251322334 435355315225 540041312231"
    ),
    "noised: tau-leaping": (
        "320143033044 151520345530 425242531250 355414254413 400213232405 512251322334 434355225225 540041312231"
    ),
    "noised: Tweedie": (
        "320143033052 151520255530 425342531240 354414544423 410213232405 512351222334 434355225225 540041311332"
    ),
    "noised: ancestral": (
        "122053035033 154524455500 405033031452 354414453413 131420234420 513244222354 434244405523 540342113132"
    ),
    "noised: trapezoidal": (
        "024143513021 153413255435 405133532000 354144504450 501211232401 512355222234 433025215222 540331110235"
    ),
    "noised: trapezoidal, late": (
        "025133503121 154424555315 425232543101 354334514220 401111233410 512345223134 332045215212 540121210224"
    ),
    "noised: uniformization": (
        "410343103200 151255225230 433453531204 354415502055 415255552000 515145224303 402225230320 540432444435"
    ),
    "noised: corrected": (
        "144133500412 153415542335 215341153223 352333513110 231041432100 511425323140 413035011311 543312121402"
    ),
    "noised: corrected twice": (
        "040111240142 153034500510 324512210055 353031351355 244305301524 515415401442 153405202425 543054244152"
    ),
    "noised: superposition": (
        "122053035033 154524455500 405033031452 354414453413 230200234420 513244222354 434225405523 540442112132"
    ),
    "noised: superposition, half": (
        "203144135042 151525555502 524212044153 355104222523 340130115401 513025222134 245424523522 540424023232"
    ),
    "controlled: hot": (
        "411131144401 151543555511 504110435111 351413053530 050301104331 513111343315 405305453545 540413030030"
    ),
    "controlled: of three": (
        "110103013313 150414443434 535404405043 350530014500 130314144033 513143113533 435443453541 540414033010"
    ),
    "controlled: most": (
        "110103013313 150414443434 535404405043 350530014500 130313144033 513133113531 005443413541 540414033010"
    ),
    "controlled: not rare": (
        "111103013313 150414443414 535404505043 350530014500 130314144033 513133113531 435443450543 541514113010"
    ),
    "controlled: once": (
        "311013113405 150404443403 513034313043 351314033404 151301404355 514034113531 114301510544 540313130110"
    ),
    "particles: hybrid": (
        "400142344001 144140322443 433014131044 341211444042 431221031123 414042311410 112312231113 443142314310"
    ),
    "particles: uniform": (
        "404224445245 144133513455 503443303312 342004022035 543020112535 412011341242 100152140310 442450155551"
    ),
    "blocks: growing": (
        "035400000000 150054000000 510400000000 355400000000 355011340000 514000000000 001300053540 540513551113"
    ),
    "blocks: in a canvas": (
        "115335511400 153311131151 511111034000 350140000000 555103303501 513315400000 353103153315 541151101001"
    ),
    "else: loop": (
        "504045543314 154435045554 414114013130 354030034331 531411445133 510553155535 501301313011 543153511111"
    ),
    "else: generator": (
        "110333455455 141314340433 354511151131 410404434013 443545550444 540530134031 101043531533 351054105004"
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_what_it_has_always_given(ref, name):
    assert ["".join(map(str, row)) for row in run(ref, name).tolist()] == KNOWN[name].split()


PIECES = [
    *("masks: path planning", "masks: by confidence", "noised: renoising", "noised: one out", "noised: superposition"),
    *("particles: uniform", "controlled: once", "blocks: growing"),
]


@pytest.mark.parametrize("name", PIECES)
def test_a_seed_gives_the_same_whatever_is_worked_at_a_time(ref, name, monkeypatch):
    """Pieces of seven rows instead of all of them."""
    for module in ("fast.answer", "infilling"):
        monkeypatch.setattr(f"sedd_samplers.{module}.rows_at_a_time", lambda num_states, device: 7)
    assert ["".join(map(str, row)) for row in run(ref, name).tolist()] == KNOWN[name].split()
