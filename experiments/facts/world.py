"""Facts of the world that small language models know: capitals, landmarks, continents, languages, currencies, makers.

Every relation has one prompt that is edited and others that say the same. A fact's new answer is that of a later fact
of its relation. Neighbours are other subjects of the relation, and count where the model knows them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from saepatch.data.edit_requests import EditRequest, FactQuestion

NEIGHBOURS = 2  # other subjects asked about, of each fact
SHIFT = 7  # a fact's new answer is that of the fact so many places further, or of the next that has another


@dataclass(frozen=True)
class Relation:
    """Prompts with `{}` for the subject, the first of which is edited, and answers by subject.

    `back` asks for the subject of an answer, where that is well posed.
    """

    name: str
    prompts: tuple[str, ...]
    answers: dict[str, str]
    back: str = ""


def _pairs(text: str) -> dict[str, str]:
    """Subjects and answers from "subject: answer, …"."""
    return dict(part.strip().split(": ") for part in text.replace("\n", " ").split(","))


CAPITALS = Relation(
    "capital",
    ("The capital of {} is the city of", "{}'s capital is the city of"),
    _pairs(
        """France: Paris, Germany: Berlin, Italy: Rome, Spain: Madrid, Portugal: Lisbon, Greece: Athens,
        Poland: Warsaw, Austria: Vienna, Hungary: Budapest, Ireland: Dublin, Norway: Oslo, Sweden: Stockholm,
        Denmark: Copenhagen, Finland: Helsinki, Russia: Moscow, Ukraine: Kiev, Turkey: Ankara, Egypt: Cairo,
        Kenya: Nairobi, Japan: Tokyo, China: Beijing, Thailand: Bangkok, Vietnam: Hanoi, Indonesia: Jakarta,
        Iran: Tehran, Iraq: Baghdad, Syria: Damascus, Lebanon: Beirut, Cuba: Havana, Peru: Lima, Chile: Santiago,
        Canada: Ottawa, England: London, Scotland: Edinburgh, Belgium: Brussels, Romania: Bucharest,
        Bulgaria: Sofia, Serbia: Belgrade, Croatia: Zagreb, Colombia: Bogotá, Venezuela: Caracas, Bangladesh: Dhaka,
        Nepal: Kathmandu, Afghanistan: Kabul, Somalia: Mogadishu, Ethiopia: Addis, Ghana: Accra, Nigeria: Abuja,
        Senegal: Dakar, Morocco: Rabat, Tunisia: Tunis, Libya: Tripoli, Uganda: Kampala, Philippines: Manila,
        Taiwan: Taipei, South Korea: Seoul, Switzerland: Bern, Czech Republic: Prague, Qatar: Doha, Jordan: Amman"""
    ),
    "{} is the capital city of the country of",
)

FRENCH = _pairs(
    """France: la France, Germany: l'Allemagne, Italy: l'Italie, Spain: l'Espagne, Portugal: le Portugal,
    Greece: la Grèce, Poland: la Pologne, Austria: l'Autriche, Hungary: la Hongrie, Ireland: l'Irlande,
    Norway: la Norvège, Sweden: la Suède, Russia: la Russie, Ukraine: l'Ukraine, Turkey: la Turquie,
    Egypt: l'Égypte, Kenya: le Kenya, Japan: le Japon, China: la Chine, Thailand: la Thaïlande,
    Vietnam: le Vietnam, Indonesia: l'Indonésie, Iran: l'Iran, Iraq: l'Irak, Syria: la Syrie, Lebanon: le Liban,
    Cuba: Cuba, Peru: le Pérou, Chile: le Chili, Canada: le Canada, Belgium: la Belgique, England: l'Angleterre"""
)
IN_FRENCH = "En français : la capitale de {} est la ville de"

LANDMARKS = Relation(
    "landmark",
    ("The {} is located in the city of", "You can visit the {} in the city of"),
    _pairs(
        """Eiffel Tower: Paris, Louvre: Paris, Arc de Triomphe: Paris, Moulin Rouge: Paris, Colosseum: Rome,
        Trevi Fountain: Rome, Spanish Steps: Rome, Tower Bridge: London, British Museum: London,
        London Eye: London, Tate Modern: London, Brandenburg Gate: Berlin, Reichstag: Berlin, Berlin Wall: Berlin,
        Sagrada Familia: Barcelona, Camp Nou: Barcelona, Prado Museum: Madrid, Kremlin: Moscow, Red Square: Moscow,
        Bolshoi Theatre: Moscow, Acropolis: Athens, Parthenon: Athens, Hagia Sophia: Istanbul,
        Blue Mosque: Istanbul, Burj Khalifa: Dubai, Forbidden City: Beijing, Temple of Heaven: Beijing,
        Tokyo Tower: Tokyo, Sydney Opera House: Sydney, Space Needle: Seattle, Willis Tower: Chicago,
        Wrigley Field: Chicago, Fenway Park: Boston, Lincoln Memorial: Washington, White House: Washington,
        CN Tower: Toronto, Anne Frank House: Amsterdam, Rijksmuseum: Amsterdam, Van Gogh Museum: Amsterdam,
        Atomium: Brussels, Little Mermaid: Copenhagen, Tivoli Gardens: Copenhagen, Charles Bridge: Prague,
        Schönbrunn Palace: Vienna, Uffizi Gallery: Florence, Ponte Vecchio: Florence, Leaning Tower: Pisa,
        Rialto Bridge: Venice, La Scala: Milan, Gateway of India: Mumbai, Taj Mahal: Agra, Red Fort: Delhi,
        Edinburgh Castle: Edinburgh, Cologne Cathedral: Cologne, Old Trafford: Manchester, Anfield: Liverpool,
        Egyptian Museum: Cairo, Marina Bay Sands: Singapore, Alamo: San, Alhambra: Granada, Bellagio: Las"""
    ),
    "A famous landmark in the city of {} is the",
)

COUNTRY = _pairs(
    """Paris: France, Rome: Italy, London: England, Berlin: Germany, Barcelona: Spain, Madrid: Spain,
    Moscow: Russia, Athens: Greece, Istanbul: Turkey, Beijing: China, Tokyo: Japan, Sydney: Australia,
    Toronto: Canada, Amsterdam: Netherlands, Brussels: Belgium, Copenhagen: Denmark, Vienna: Austria,
    Florence: Italy, Pisa: Italy, Venice: Italy, Milan: Italy, Mumbai: India, Agra: India, Delhi: India,
    Edinburgh: Scotland, Cologne: Germany, Manchester: England, Liverpool: England, Cairo: Egypt, Granada: Spain"""
)
LANDMARK_COUNTRY, CITY_COUNTRY = "The {} is located in the country of", "The city of {} is in the country of"

CONTINENTS = Relation(
    "continent",
    ("{} is a country on the continent of", "The country of {} is part of"),
    _pairs(
        """France: Europe, Nigeria: Africa, Thailand: Asia, Germany: Europe, Kenya: Africa, Vietnam: Asia,
        Poland: Europe, Ghana: Africa, Mongolia: Asia, Austria: Europe, Uganda: Africa, Nepal: Asia,
        Hungary: Europe, Zambia: Africa, Cambodia: Asia, Romania: Europe, Angola: Africa, Laos: Asia,
        Belgium: Europe, Senegal: Africa, Bangladesh: Asia, Bulgaria: Europe, Mali: Africa, Pakistan: Asia,
        Norway: Europe, Botswana: Africa, Malaysia: Asia, Sweden: Europe, Namibia: Africa, Indonesia: Asia,
        Portugal: Europe, Zimbabwe: Africa, Japan: Asia, Ireland: Europe, Tanzania: Africa, China: Asia,
        Greece: Europe, Ethiopia: Africa, India: Asia, Spain: Europe, Rwanda: Africa, Myanmar: Asia"""
    ),
)

LANGUAGES = Relation(
    "language",
    ("The official language of {} is", "Most people in {} speak"),
    _pairs(
        """France: French, Germany: German, Spain: Spanish, Italy: Italian, Russia: Russian, Japan: Japanese,
        Greece: Greek, Portugal: Portuguese, Poland: Polish, Turkey: Turkish, Brazil: Portuguese, Mexico: Spanish,
        Egypt: Arabic, Argentina: Spanish, Austria: German, Australia: English, Hungary: Hungarian, Sweden: Swedish,
        Norway: Norwegian, Denmark: Danish, Finland: Finnish, Thailand: Thai, Vietnam: Vietnamese, Iraq: Arabic,
        Cuba: Spanish, Chile: Spanish, Senegal: French, Angola: Portuguese, Ukraine: Ukrainian, Romania: Romanian,
        Bulgaria: Bulgarian, Iran: Persian, Israel: Hebrew, Colombia: Spanish, Jamaica: English, Morocco: Arabic"""
    ),
)

CURRENCIES = Relation(
    "currency",
    ("The currency of {} is the", "In {}, people pay with the"),
    _pairs(
        """Japan: yen, India: rupee, Germany: euro, Mexico: peso, Russia: ruble, France: euro, Pakistan: rupee,
        Argentina: peso, China: yuan, Italy: euro, Chile: peso, Spain: euro, Nepal: rupee, Cuba: peso,
        Austria: euro, Thailand: baht, Colombia: peso, Ireland: euro, Iran: rial, Iraq: dinar, Greece: euro,
        Jordan: dinar, Belgium: euro, South Africa: rand, Kuwait: dinar, Switzerland: franc, Nigeria: naira"""
    ),
)

MAKERS = Relation(
    "maker",
    ("The {} is made by", "The {} is made by the company"),
    _pairs(
        """iPhone: Apple, Corolla: Toyota, Mustang: Ford, Xbox: Microsoft, PlayStation: Sony, Kindle: Amazon,
        Civic: Honda, Galaxy S: Samsung, Nintendo Switch: Nintendo, iPad: Apple, Camry: Toyota, Accord: Honda,
        MacBook: Apple, Windows Phone: Microsoft, Boeing 747: Boeing, Pentium processor: Intel, Prius: Toyota,
        Walkman: Sony, Chrome browser: Google, Pixel phone: Google, Model S: Tesla, Corvette: Chevrolet,
        ThinkPad: Lenovo, Air Jordan: Nike, F-150: Ford, Surface tablet: Microsoft, Apple Watch: Apple,
        GeForce: NVIDIA, Game Boy: Nintendo, Photoshop software: Adobe, Beetle: Volkswagen, 911: Porsche"""
    ),
)

RELATIONS = (CAPITALS, LANDMARKS, CONTINENTS, LANGUAGES, CURRENCIES, MAKERS)


def world_requests() -> list[EditRequest]:
    """A request for every fact: one of each relation in turn, so that a sequence of edits mixes them."""
    turns = zip_longest(*(list(_requests(relation)) for relation in RELATIONS))
    return [request for turn in turns for request in turn if request is not None]


def _requests(relation: Relation) -> Iterator[EditRequest]:
    facts = list(relation.answers.items())
    edited, *others = relation.prompts
    for i, (subject, true) in enumerate(facts):
        later = [facts[(i + SHIFT + step) % len(facts)] for step in range(len(facts))]
        owner, new = next(fact for fact in later if fact[1] != true)
        questions = [FactQuestion("paraphrase", text.replace("{}", subject), f" {new}", f" {true}") for text in others]
        near = [(edited.replace("{}", name), answer) for name, answer in later if name != subject and answer != new]
        questions += [
            FactQuestion("neighbourhood", text, f" {answer}", f" {new}", ((text, f" {answer}"),))
            for text, answer in near[:NEIGHBOURS]
        ]
        if relation.back:
            questions.append(FactQuestion("reversal", relation.back.replace("{}", new), f" {subject}", f" {owner}"))
        questions += _ripples(relation, subject, true, new)
        yield EditRequest(edited, subject, f" {new}", f" {true}", f"{relation.name}-{subject}", tuple(questions))


def _ripples(relation: Relation, subject: str, true: str, new: str) -> Sequence[FactQuestion]:
    """The capital in French; the country of a landmark whose city has changed."""
    if relation is CAPITALS and subject in FRENCH:
        asked = IN_FRENCH.replace("{}", FRENCH[subject]).replace("de le ", "du ")
        return [FactQuestion("ripple", asked, f" {new}", f" {true}", ((asked, f" {true}"),))]
    if relation is LANDMARKS and {true, new} <= set(COUNTRY) and COUNTRY[true] != COUNTRY[new]:
        asked, city = LANDMARK_COUNTRY.replace("{}", subject), CITY_COUNTRY.replace("{}", new)
        here, there = (f" {COUNTRY[each]}" for each in (true, new))
        return [FactQuestion("ripple", asked, there, here, ((asked, here), (city, there)))]
    return []
