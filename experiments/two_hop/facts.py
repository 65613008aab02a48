"""Facts of two hops for real models: subject → country → something of the country.

Which of them a model knows, both hops of them, is measured; the others are left out. Answers that are not one token of
its vocabulary are left out, too.
"""

# Subjects by country, and how the first hop asks for the country of each kind.
SUBJECTS: dict[str, dict[str, tuple[str, ...]]] = {
    "landmark": {
        "France": ("Eiffel Tower", "Louvre Museum", "Palace of Versailles", "Notre Dame Cathedral"),
        "Italy": ("Colosseum", "Leaning Tower of Pisa", "Trevi Fountain", "Uffizi Gallery"),
        "Germany": ("Brandenburg Gate", "Neuschwanstein Castle", "Cologne Cathedral", "Reichstag building"),
        "Spain": ("Sagrada Familia", "Prado Museum", "Alhambra"),
        "Egypt": ("Great Sphinx", "Pyramids of Giza", "Valley of the Kings"),
        "China": ("Great Wall", "Forbidden City", "Terracotta Army"),
        "Japan": ("Mount Fuji", "Golden Pavilion", "Tokyo Tower"),
        "India": ("Taj Mahal", "Red Fort", "Golden Temple"),
        "Russia": ("Kremlin", "Hermitage Museum", "Red Square"),
        "Greece": ("Acropolis", "Parthenon", "Temple of Delphi"),
        "England": ("Big Ben", "Stonehenge", "Buckingham Palace"),
        "Turkey": ("Hagia Sophia", "Blue Mosque", "Topkapi Palace"),
        "Brazil": ("Christ the Redeemer", "Sugarloaf Mountain", "Maracana Stadium"),
        "Australia": ("Sydney Opera House", "Great Barrier Reef", "Uluru"),
        "Mexico": ("Chichen Itza", "Teotihuacan", "Palenque"),
        "Peru": ("Machu Picchu", "Nazca Lines"),
        "Austria": ("Schonbrunn Palace", "Hofburg Palace"),
        "Portugal": ("Belem Tower", "Pena Palace"),
    },
    "city": {
        "France": ("Lyon", "Marseille", "Toulouse", "Bordeaux"), "Italy": ("Milan", "Florence", "Naples", "Venice"),
        "Germany": ("Munich", "Hamburg", "Frankfurt", "Cologne"), "Spain": ("Barcelona", "Seville", "Valencia"),
        "Egypt": ("Alexandria", "Luxor", "Giza"), "China": ("Shanghai", "Guangzhou", "Wuhan"),
        "Japan": ("Osaka", "Kyoto", "Hiroshima"), "India": ("Mumbai", "Calcutta", "Bangalore"),
        "Russia": ("Vladivostok", "Novosibirsk", "Kazan"), "Greece": ("Thessaloniki", "Patras"),
        "England": ("Manchester", "Liverpool", "Leeds"), "Turkey": ("Izmir", "Antalya"),
        "Brazil": ("Rio de Janeiro", "Salvador"), "Australia": ("Melbourne", "Brisbane", "Perth"),
        "Mexico": ("Guadalajara", "Monterrey", "Tijuana"), "Peru": ("Cusco", "Arequipa"),
        "Austria": ("Salzburg", "Graz", "Innsbruck"), "Portugal": ("Porto", "Coimbra"),
    },
    "person": {
        "France": ("Napoleon Bonaparte", "Victor Hugo", "Claude Monet"),
        "Italy": ("Leonardo da Vinci", "Galileo Galilei", "Dante Alighieri"),
        "Germany": ("Johann Sebastian Bach", "Otto von Bismarck", "Martin Luther"),
        "Spain": ("Pablo Picasso", "Miguel de Cervantes", "Salvador Dali"),
        "Egypt": ("Cleopatra", "Gamal Abdel Nasser"), "China": ("Mao Zedong", "Confucius", "Xi Jinping"),
        "Japan": ("Akira Kurosawa", "Haruki Murakami", "Hayao Miyazaki"),
        "India": ("Mahatma Gandhi", "Indira Gandhi", "Rabindranath Tagore"),
        "Russia": ("Vladimir Putin", "Leo Tolstoy", "Anton Chekhov"), "Greece": ("Socrates", "Plato", "Aristotle"),
        "England": ("William Shakespeare", "Charles Dickens", "Isaac Newton"),
        "Turkey": ("Mustafa Kemal Ataturk", "Orhan Pamuk"), "Brazil": ("Pele", "Ayrton Senna"),
        "Mexico": ("Frida Kahlo", "Diego Rivera"), "Austria": ("Wolfgang Amadeus Mozart", "Sigmund Freud"),
        "Portugal": ("Cristiano Ronaldo", "Vasco da Gama"),
    },
}  # fmt: skip
FIRST_HOP: dict[str, tuple[str, ...]] = {
    "landmark": ("The {x} is located in the country of", "The country where you can visit the {x} is"),
    "city": ("The city of {x} is located in the country of", "{x} is a city in the country of"),
    "person": ("{x} was born in the country of", "The native country of {x} was"),
}
COUNTRY_OF = {
    "landmark": "the country where the {x} is",
    "city": "the country where the city of {x} is",
    "person": "the country where {x} was born",
}
# By relation: the question about a country, and its answers.
RELATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "capital": (
        "The capital of {x} is the city of",
        {"France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Egypt": "Cairo",
         "China": "Beijing", "Japan": "Tokyo", "India": "Delhi", "Russia": "Moscow", "Greece": "Athens",
         "England": "London", "Turkey": "Ankara", "Australia": "Canberra", "Peru": "Lima",
         "Austria": "Vienna", "Portugal": "Lisbon"},
    ),
    "language": (
        "The people of {x} speak the language called",
        {"France": "French", "Italy": "Italian", "Germany": "German", "Spain": "Spanish", "Egypt": "Arabic",
         "China": "Chinese", "Japan": "Japanese", "India": "Hindi", "Russia": "Russian", "Greece": "Greek",
         "England": "English", "Turkey": "Turkish", "Brazil": "Portuguese", "Australia": "English",
         "Mexico": "Spanish", "Peru": "Spanish", "Austria": "German", "Portugal": "Portuguese"},
    ),
    "continent": (
        "On a map of the world, {x} is on the continent of",
        {"France": "Europe", "Italy": "Europe", "Germany": "Europe", "Spain": "Europe", "Egypt": "Africa",
         "China": "Asia", "Japan": "Asia", "India": "Asia", "Russia": "Europe", "Greece": "Europe",
         "England": "Europe", "Brazil": "South", "Australia": "Australia", "Mexico": "North", "Peru": "South",
         "Austria": "Europe", "Portugal": "Europe"},
    ),
    "currency": (
        "The currency that people use in {x} is called the",
        {"France": "euro", "Italy": "euro", "Germany": "euro", "Spain": "euro", "Egypt": "Egyptian", "China": "yuan",
         "Japan": "yen", "India": "rupee", "Russia": "ruble", "Greece": "euro", "England": "pound", "Turkey": "lira",
         "Brazil": "real", "Australia": "Australian", "Mexico": "peso", "Peru": "sol", "Austria": "euro",
         "Portugal": "euro"},
    ),
}  # fmt: skip
