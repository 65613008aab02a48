"""Capitals in four languages, for real models."""

# By language, "The capital of X is", once for each split: prompts end before the copula or before the answer.
CAPITAL = {
    "English": (("The capital of {x}", " is"), ("The capital city of {x}", " is")),
    "French": (("La capitale {x}", " est"), ("La ville capitale {x}", " est")),
    "German": (("Die Hauptstadt von {x}", " ist"), ("Die heutige Hauptstadt von {x}", " ist")),
    "Spanish": (("La capital de {x}", " es"), ("La ciudad capital de {x}", " es")),
}
# Country and capital by language.
COUNTRIES = {
    "Italy": {"English": ("Italy", "Rome"), "French": ("de l'Italie", "Rome"), "German": ("Italien", "Rom"),
              "Spanish": ("Italia", "Roma")},
    "Austria": {"English": ("Austria", "Vienna"), "French": ("de l'Autriche", "Vienne"),
                "German": ("Österreich", "Wien"), "Spanish": ("Austria", "Viena")},
    "Russia": {"English": ("Russia", "Moscow"), "French": ("de la Russie", "Moscou"), "German": ("Russland", "Moskau"),
               "Spanish": ("Rusia", "Moscú")},
    "England": {"English": ("England", "London"), "French": ("de l'Angleterre", "Londres"),
                "German": ("England", "London"), "Spanish": ("Inglaterra", "Londres")},
    "Greece": {"English": ("Greece", "Athens"), "French": ("de la Grèce", "Athènes"),
               "German": ("Griechenland", "Athen"), "Spanish": ("Grecia", "Atenas")},
    "Poland": {"English": ("Poland", "Warsaw"), "French": ("de la Pologne", "Varsovie"),
               "German": ("Polen", "Warschau"), "Spanish": ("Polonia", "Varsovia")},
    "Portugal": {"English": ("Portugal", "Lisbon"), "French": ("du Portugal", "Lisbonne"),
                 "German": ("Portugal", "Lissabon"), "Spanish": ("Portugal", "Lisboa")},
    "Egypt": {"English": ("Egypt", "Cairo"), "French": ("de l'Égypte", "Le"), "German": ("Ägypten", "Kairo"),
              "Spanish": ("Egipto", "El")},
    "China": {"English": ("China", "Beijing"), "French": ("de la Chine", "Pékin"), "German": ("China", "Peking"),
              "Spanish": ("China", "Pekín")},
    "France": {"English": ("France", "Paris"), "French": ("de la France", "Paris"), "German": ("Frankreich", "Paris"),
               "Spanish": ("Francia", "París")},
    "Germany": {"English": ("Germany", "Berlin"), "French": ("de l'Allemagne", "Berlin"),
                "German": ("Deutschland", "Berlin"), "Spanish": ("Alemania", "Berlín")},
    "Spain": {"English": ("Spain", "Madrid"), "French": ("de l'Espagne", "Madrid"), "German": ("Spanien", "Madrid"),
              "Spanish": ("España", "Madrid")},
    "Japan": {"English": ("Japan", "Tokyo"), "French": ("du Japon", "Tokyo"), "German": ("Japan", "Tokio"),
              "Spanish": ("Japón", "Tokio")},
}  # fmt: skip
