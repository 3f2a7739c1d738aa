"""Networks that are built in, as data: {name: (what it is, {variable: states}, {variable: (parents, table)})}.

In a table each parent has an axis, in the order in which the parents are listed, and the variable's own states come
last, so that the innermost lists sum to 1. GRAPHS holds graphs of the course sheets without numbers, MARKOV factors.

Sources
  asia        Lauritzen, Spiegelhalter, Local computations with probabilities, JRSS B 50(2), 1988
  cancer      Korb, Nicholson, Bayesian Artificial Intelligence, 2010, section 2.2
  burglary    Pearl, Probabilistic Reasoning in Intelligent Systems, 1988; numbers of Russell, Norvig, chapter 14
  sprinkler   Murphy, A brief introduction to graphical models and Bayesian networks, 1998
  kntu        K. N. Toosi University, Deep Generative Models, homework 2, question 1
  server, medical    University of Tehran, Deep Generative Models: the graphs are the sheets', the numbers ours
"""

from math import exp

YES = ("yes", "no")
BIT = ("0", "1")

NETWORKS = {
    "asia": ("chest clinic", dict.fromkeys(("asia", "tub", "smoke", "lung", "bronc", "either", "xray", "dysp"), YES), {
        "asia": ((), [0.01, 0.99]),
        "tub": (("asia",), [[0.05, 0.95], [0.01, 0.99]]),
        "smoke": ((), [0.5, 0.5]),
        "lung": (("smoke",), [[0.1, 0.9], [0.01, 0.99]]),
        "bronc": (("smoke",), [[0.6, 0.4], [0.3, 0.7]]),
        "either": (("lung", "tub"), [[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]),
        "xray": (("either",), [[0.98, 0.02], [0.05, 0.95]]),
        "dysp": (("bronc", "either"), [[[0.9, 0.1], [0.8, 0.2]], [[0.7, 0.3], [0.1, 0.9]]]),
    }),
    "cancer": ("lung cancer", {"Pollution": ("low", "high"), "Smoker": ("True", "False"), "Cancer": ("True", "False"),
                               "Xray": ("positive", "negative"), "Dyspnoea": ("True", "False")}, {
        "Pollution": ((), [0.9, 0.1]),
        "Smoker": ((), [0.3, 0.7]),
        "Cancer": (("Pollution", "Smoker"), [[[0.03, 0.97], [0.001, 0.999]], [[0.05, 0.95], [0.02, 0.98]]]),
        "Xray": (("Cancer",), [[0.9, 0.1], [0.2, 0.8]]),
        "Dyspnoea": (("Cancer",), [[0.65, 0.35], [0.3, 0.7]]),
    }),
    "burglary": ("alarm, and neighbours who call", dict.fromkeys(("B", "E", "A", "J", "M"), YES), {
        "B": ((), [0.001, 0.999]),
        "E": ((), [0.002, 0.998]),
        "A": (("B", "E"), [[[0.95, 0.05], [0.94, 0.06]], [[0.29, 0.71], [0.001, 0.999]]]),
        "J": (("A",), [[0.9, 0.1], [0.05, 0.95]]),
        "M": (("A",), [[0.7, 0.3], [0.01, 0.99]]),
    }),
    "sprinkler": ("wet grass", dict.fromkeys(("cloudy", "sprinkler", "rain", "wet"), YES), {
        "cloudy": ((), [0.5, 0.5]),
        "sprinkler": (("cloudy",), [[0.1, 0.9], [0.5, 0.5]]),
        "rain": (("cloudy",), [[0.8, 0.2], [0.2, 0.8]]),
        "wet": (("sprinkler", "rain"), [[[0.99, 0.01], [0.9, 0.1]], [[0.9, 0.1], [0.0, 1.0]]]),
    }),
    "kntu": ("B -> A, B -> D <- C, C -> E", dict.fromkeys(("B", "C", "A", "D", "E"), BIT), {
        "B": ((), [0.6, 0.4]),
        "C": ((), [0.3, 0.7]),
        "A": (("B",), [[0.8, 0.2], [0.8, 0.2]]),             # the sheet gives one number, whatever B is
        "D": (("C", "B"), [[[0.8, 0.2], [0.6, 0.4]], [[0.4, 0.6], [0.2, 0.8]]]),
        "E": (("C",), [[0.5, 0.5], [0.9, 0.1]]),
    }),
    "server": ("Open door, Ac failure, high Temperature, Message, Siren", dict.fromkeys("OATMS", YES), {
        "O": ((), [0.1, 0.9]),
        "A": ((), [0.02, 0.98]),
        "T": (("O", "A"), [[[0.98, 0.02], [0.35, 0.65]], [[0.9, 0.1], [0.02, 0.98]]]),
        "M": (("T",), [[0.95, 0.05], [0.01, 0.99]]),
        "S": (("O",), [[0.9, 0.1], [0.005, 0.995]]),
    }),
    "medical": ("iMmune strength, Season, wealth F, Illness, Treatment, Death",
                {"M": ("strong", "weak"), "S": ("summer", "winter"), "F": ("rich", "poor"),
                 "I": ("none", "mild", "severe"), "T": YES, "D": YES}, {
        "M": ((), [0.7, 0.3]),
        "S": ((), [0.5, 0.5]),
        "F": ((), [0.4, 0.6]),
        "I": (("M", "S"), [[[0.9, 0.08, 0.02], [0.7, 0.25, 0.05]], [[0.6, 0.3, 0.1], [0.3, 0.4, 0.3]]]),
        "T": (("I", "F"), [[[0.05, 0.95], [0.02, 0.98]], [[0.7, 0.3], [0.4, 0.6]], [[0.98, 0.02], [0.75, 0.25]]]),
        "D": (("I", "T"), [[[0.002, 0.998], [0.001, 0.999]], [[0.004, 0.996], [0.02, 0.98]],
                           [[0.08, 0.92], [0.4, 0.6]]]),
    }),
}

# the four factors of K. N. Toosi, homework 2, question 3, on A, B, C, D in {-1, 1}
SPINS = (-1, 1)
MARKOV = {
    "markov": ("four spins in a ring", dict.fromkeys("ABCD", ("-1", "1")), [
        (("A", "B"), [[exp(a * b) for b in SPINS] for a in SPINS]),
        (("B", "C"), [[exp(b != c) for c in SPINS] for b in SPINS]),
        (("C", "D"), [[exp(d + c * d) for d in SPINS] for c in SPINS]),
        (("A", "D"), [[exp(-a * d) for d in SPINS] for a in SPINS]),
    ]),
}

# University of Tehran, 1403: an undirected graph by its edges, and two DAGs by their parents
GRAPHS = {
    "ut-markov": "AB BC BD CD CE CG DE DF EF FH GI",
    "ut-bayes": {"1": "", "2": "1", "3": "1", "4": "2", "5": "23", "6": "35", "7": "46"},
    "ut-siren": {"O": "", "A": "", "S": "O", "T": "OA", "B": "S", "M": "ABT"},
}
