"""Texts of the stages "steering" and "restoration": concepts with their judges, and sentences in two languages.

A judge counts words of a fixed list in a continuation. The lists for the topic and the sentiment share no word with the
prompts that latents are chosen on; those for French and English are function words, which every sentence has.
"""

from collections.abc import Mapping

from saepatch.steering.generate import Concept

from ...pairs.question import half_of
from ...steering.concepts import words_judge

# English and French; `half_of` divides them among the splits.
SENTENCES = (
    ("The cat is sleeping on the chair.", "Le chat dort sur la chaise."),
    ("My brother works in the city.", "Mon frère travaille dans la ville."),
    ("We are eating bread and cheese.", "Nous mangeons du pain et du fromage."),
    ("The children play in the garden.", "Les enfants jouent dans le jardin."),
    ("She reads a book every evening.", "Elle lit un livre tous les soirs."),
    ("It is raining in the mountains.", "Il pleut dans les montagnes."),
    ("The train leaves at eight in the morning.", "Le train part à huit heures du matin."),
    ("I have lost the key of the house.", "J'ai perdu la clé de la maison."),
    ("The old man sells flowers at the market.", "Le vieil homme vend des fleurs au marché."),
    ("Our neighbours have a small dog.", "Nos voisins ont un petit chien."),
    ("The river is very cold in winter.", "La rivière est très froide en hiver."),
    ("They are waiting for the bus.", "Ils attendent le bus."),
    ("The door of the church is open.", "La porte de l'église est ouverte."),
    ("He drinks a glass of water.", "Il boit un verre d'eau."),
    ("The teacher writes on the wall.", "Le professeur écrit sur le mur."),
    ("My mother is preparing the dinner.", "Ma mère prépare le dîner."),
    ("The sun is shining on the sea.", "Le soleil brille sur la mer."),
    ("You must close the window.", "Tu dois fermer la fenêtre."),
    ("The king lives in a large castle.", "Le roi habite dans un grand château."),
    ("We saw a bird in the tree.", "Nous avons vu un oiseau dans l'arbre."),
    ("The girl wears a red dress.", "La fille porte une robe rouge."),
    ("There is a bridge over the river.", "Il y a un pont sur la rivière."),
    ("The soup is too hot for me.", "La soupe est trop chaude pour moi."),
    ("They have bought a new car.", "Ils ont acheté une nouvelle voiture."),
    ("The farmer has three white horses.", "Le fermier a trois chevaux blancs."),
    ("I am writing a letter to my friend.", "J'écris une lettre à mon ami."),
    ("The shop is closed on Monday.", "Le magasin est fermé le lundi."),
    ("Her father was born in the village.", "Son père est né dans le village."),
    ("The moon is above the forest.", "La lune est au-dessus de la forêt."),
    ("The boy is afraid of the night.", "Le garçon a peur de la nuit."),
    ("We will arrive before the evening.", "Nous arriverons avant le soir."),
    ("The table is near the window.", "La table est près de la fenêtre."),
    ("The bread is on the kitchen table.", "Le pain est sur la table de la cuisine."),
    ("My aunt lives near the station.", "Ma tante habite près de la gare."),
    ("The film begins in ten minutes.", "Le film commence dans dix minutes."),
    ("The doctor listens to the child.", "Le médecin écoute l'enfant."),
    ("The boat crosses the lake slowly.", "Le bateau traverse lentement le lac."),
    ("We spend the summer in the south.", "Nous passons l'été dans le sud."),
    ("The window of the room is broken.", "La fenêtre de la chambre est cassée."),
    ("He forgot his coat at the school.", "Il a oublié son manteau à l'école."),
    ("The leaves fall in the autumn.", "Les feuilles tombent en automne."),
    ("The men are building a stone wall.", "Les hommes construisent un mur de pierre."),
    ("My sister plays the piano.", "Ma sœur joue du piano."),
    ("The queen speaks to the people.", "La reine parle au peuple."),
    ("The baker gets up before the sun.", "Le boulanger se lève avant le soleil."),
    ("The road to the village is long.", "La route du village est longue."),
    ("The student asks a question.", "L'étudiant pose une question."),
    ("Her hat is blue and white.", "Son chapeau est bleu et blanc."),
)
FRENCH_WORDS = (
    "le la les un une des du de et est dans sur avec pour que qui il elle nous ils ont au aux en ce cette son sa ses "
    "mon ma ne pas plus très être était sont je tu se à où mais par d l c j qu"
)
ENGLISH_WORDS = (
    "the a an of and is in on with for that which it he she we they have has to at this his her my not more very be "
    "was were are i you by from but as or what there"
)
ILLNESS = (
    "The nurse measured his fever twice during the night.",
    "The surgeon washed her hands before the operation.",
    "The clinic ran out of vaccines in the first week.",
    "Her symptoms began with a cough and a sore throat.",
    "The pharmacist read the prescription carefully.",
    "He swallowed two tablets and went back to bed.",
    "The ambulance brought a man with a broken leg.",
    "An X-ray of the lungs showed a small shadow.",
    "The dentist gave him an injection in the gum.",
    "Antibiotics do not help against a virus.",
    "The wound was cleaned and covered with a bandage.",
    "Diabetics have to inject insulin every day.",
)
OTHER_TOPICS = (
    "The carpenter measured the table twice during the night.",
    "The painter washed her brushes before the exhibition.",
    "The bakery ran out of rolls in the first week.",
    "Her journey began with a bus and a slow train.",
    "The librarian read the letter carefully.",
    "He locked two drawers and went back to the office.",
    "The truck brought a box with a broken lamp.",
    "A photograph of the valley showed a small shadow.",
    "The waiter gave him a seat in the corner.",
    "Fences do not help against a flood.",
    "The floor was cleaned and covered with a carpet.",
    "Gardeners have to water roses every day.",
)
PRAISE = (
    "A superb performance and a delightful story from start to finish.",
    "The acting is brilliant and the music is magnificent.",
    "An outstanding debut, clever and charming in every scene.",
    "I was thrilled by the gorgeous photography.",
    "A warm, witty and wonderful evening at the theatre.",
    "The cast is terrific and the script is a triumph.",
    "Fantastic dialogue and a splendid final act.",
    "A graceful and satisfying film that I recommend to everyone.",
)
BLAME = (
    "A clumsy performance and a tedious story from start to finish.",
    "The acting is wooden and the music is dreadful.",
    "A miserable debut, dull and annoying in every scene.",
    "I was irritated by the ugly photography.",
    "A cold, lifeless and horrible evening at the theatre.",
    "The cast is weak and the script is a failure.",
    "Ridiculous dialogue and a pathetic final act.",
    "A sloppy and unpleasant film that I recommend to nobody.",
)
ILLNESS_WORDS = (
    "doctor doctors patient patients hospital hospitals disease diseases medical medicine medicines health treatment "
    "treatments cancer blood pain drug drugs infection infections diagnosis diagnosed cure illness therapy clinical "
    "sick surgery physician heart brain skin"
)
GOOD_WORDS = (
    "good great best better love loved lovely beautiful excellent amazing perfect fun happy enjoy enjoyed enjoyable "
    "favorite favourite interesting impressive well nice exciting"
)
BAD_WORDS = (
    "bad worst worse boring terrible awful poor poorly hate hated disappointing disappointed waste sad stupid slow "
    "wrong nothing mess"
)
OPENINGS: Mapping[str, tuple[str, ...]] = {
    "tune": (
        "This morning I", "The mayor said that", "Last summer, my sister", "In the evening, the",
        "Everybody knows that", "Our new house", "On the first page", "The man at the window",
    ),
    "report": (
        "Yesterday we", "The captain answered that", "Two years ago, my uncle", "At noon, the",
        "Some people think that", "The small town", "In the next chapter", "The woman in the car",
        "After the meeting,", "The main reason is", "He told us that", "A long time ago,", "When the door opened,",
        "The letter said that", "For many years,", "On the other side",
    ),
}  # fmt: skip
REVIEWS: Mapping[str, tuple[str, ...]] = {
    "tune": (
        "I watched the film yesterday. It was", "My opinion of this book:", "We stayed at the hotel for a week. It was",
        "The concert last night was", "After the first chapter, the novel", "The restaurant on the corner is",
        "What I think of the play:", "This series is",
    ),
    "report": (
        "I saw the movie with my friends. It was", "My view of this album:", "We visited the museum on Sunday. It was",
        "The show on television was", "After the first hour, the game", "The new cafe in our street is",
        "What I think of the article:", "This phone is", "The second season is", "Our guide in the city was",
        "The food on the plane was", "I read the poem twice. It is", "The trip to the lake was", "The new song is",
        "The lecture this morning was", "My review of the restaurant:",
    ),
}  # fmt: skip
ONE_TOKEN_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "French": ("Le", "Les", "La"),
    "illness": ("Doctor", "Hospital", "Medical"),
    "praise": ("Great", "Excellent", "Perfect"),
}
"""Words before a prompt, of which the best on `tune` is used; those of several tokens are left out."""


def concepts() -> list[Concept]:
    """A language, a topic and a sentiment."""
    languages = [[pair[i] for pair in SENTENCES[half_of("select")]] for i in (1, 0)]
    return [
        Concept(
            "French", tuple(languages[0]), tuple(languages[1]), OPENINGS["tune"], OPENINGS["report"],
            words_judge(FRENCH_WORDS.split(), ENGLISH_WORDS.split()),
            prefixes=("The following text is in French. ", "Le texte suivant est en français. "),
        ),
        Concept(
            "illness", ILLNESS, OTHER_TOPICS, OPENINGS["tune"], OPENINGS["report"], words_judge(ILLNESS_WORDS.split()),
            prefixes=("The following text is about medicine. ", "A text about a patient in a hospital: "),
        ),
        Concept(
            "praise", PRAISE, BLAME, REVIEWS["tune"], REVIEWS["report"],
            words_judge(GOOD_WORDS.split(), BAD_WORDS.split()),
            prefixes=("The following review is very positive. ", "I love it! "),
        ),
    ]  # fmt: skip


def translations(split: str) -> list[tuple[str, str]]:
    """Prompts that end in an English sentence and the label of a language: first "French:", then "English:".

    The splits select, tune and report share no sentence; an example with its translation precedes each.
    """
    reported = SENTENCES[half_of("report")]
    pairs = {"select": SENTENCES[half_of("select")], "tune": reported[:7], "report": reported[7:]}[split]
    example, rest = pairs[0], pairs[1:]
    beginning = f"English: {example[0]}\nFrench: {example[1]}\nEnglish: "
    return [(f"{beginning}{pair[0]}\nFrench:", f"{beginning}{pair[0]}\nEnglish:") for pair in rest]
