//! The words of the made-up catalogue: departments, their kinds of product, and what products are like.
//!
//! The kinds of a department stand in an order in which people take to them: each goes with the one after it.

/// A department of the shop.
pub struct Department {
    pub name: &'static str,
    pub kinds: [&'static str; 8],
    pub materials: [&'static str; 4],
    pub purposes: [&'static str; 4],
    pub brands: [&'static str; 3],
}

pub const DEPARTMENTS: [Department; 10] = [
    Department {
        name: "Camping",
        kinds: ["tent", "sleeping-bag", "ground-mat", "lantern", "camp-stove", "mess-kit", "water-filter", "backpack"],
        materials: ["nylon", "canvas", "aluminium", "polyester"],
        purposes: ["mountain", "festival", "lakeside", "winter"],
        brands: ["Fernholt", "Pikewood", "Odderby"],
    },
    Department {
        name: "Coffee",
        kinds: ["grinder", "kettle", "dripper", "paper-filter", "scale", "server", "mug", "milk-frother"],
        materials: ["ceramic", "glass", "steel", "copper"],
        purposes: ["breakfast", "office", "travel", "tasting"],
        brands: ["Morrano", "Kessel", "Brightcup"],
    },
    Department {
        name: "Garden",
        kinds: ["seed-tray", "trowel", "watering-can", "planter", "trellis", "pruner", "hose", "compost-bin"],
        materials: ["cedar", "terracotta", "zinc", "willow"],
        purposes: ["balcony", "vegetable", "herb", "rose"],
        brands: ["Greenlaw", "Thistleby", "Hortum"],
    },
    Department {
        name: "Painting",
        kinds: ["sketchbook", "pencil-set", "watercolour", "brush-set", "palette", "easel", "varnish", "portfolio"],
        materials: ["beech", "cotton", "sable", "linen"],
        purposes: ["landscape", "portrait", "studio", "outdoor"],
        brands: ["Ateliera", "Vermeulen", "Huebrook"],
    },
    Department {
        name: "Cycling",
        kinds: ["helmet", "bike-lock", "pump", "tyre", "saddle", "pannier", "bell", "chain-oil"],
        materials: ["carbon", "leather", "rubber", "titanium"],
        purposes: ["commuter", "touring", "gravel", "racing"],
        brands: ["Velomar", "Crankley", "Spoken"],
    },
    Department {
        name: "Baking",
        kinds: [
            "mixing-bowl",
            "whisk",
            "rolling-pin",
            "cake-tin",
            "cooling-rack",
            "piping-bag",
            "cake-stand",
            "cookie-cutter",
        ],
        materials: ["silicone", "maple", "enamel", "tin"],
        purposes: ["wedding", "christmas", "bread", "pastry"],
        brands: ["Crumbly", "Ovenfield", "Sweetwick"],
    },
    Department {
        name: "Nursery",
        kinds: ["cradle", "mobile", "swaddle", "bottle", "bib", "teether", "stroller", "playmat"],
        materials: ["organic-cotton", "muslin", "birch", "fleece"],
        purposes: ["newborn", "bedtime", "playtime", "daycare"],
        brands: ["Lullaby-Lane", "Tinytoft", "Babbelo"],
    },
    Department {
        name: "Music",
        kinds: ["guitar", "strings", "tuner", "capo", "strap", "music-stand", "metronome", "amplifier"],
        materials: ["rosewood", "spruce", "mahogany", "brass"],
        purposes: ["rehearsal", "stage", "recording", "lesson"],
        brands: ["Harmona", "Fretwell", "Cantabile"],
    },
    Department {
        name: "Pets",
        kinds: ["puppy-crate", "collar", "leash", "food-bowl", "chew-toy", "dog-bed", "grooming-brush", "treat-pouch"],
        materials: ["hemp", "plush", "bamboo", "suede"],
        purposes: ["training", "hiking", "indoor", "senior"],
        brands: ["Waggery", "Pawling", "Houndsworth"],
    },
    Department {
        name: "Desk",
        kinds: ["notebook", "fountain-pen", "ink", "pen-case", "desk-lamp", "letter-tray", "calendar", "paperweight"],
        materials: ["walnut", "marble", "cork", "felt"],
        purposes: ["journal", "study", "calligraphy", "planning"],
        brands: ["Quillon", "Papermoor", "Inkwell-Row"],
    },
];

/// A user keeps to one of these across departments.
pub const STYLES: [&str; 8] =
    ["rustic", "minimalist", "vintage", "colourful", "compact", "luxury", "waterproof", "handmade"];

pub const COLOURS: [&str; 8] = ["black", "white", "red", "green", "navy", "yellow", "grey", "teal"];

/// Adjectives that say nothing; they stand in descriptions.
pub const PRAISE: [&str; 6] = ["lovely", "dependable", "well-made", "popular", "trusted", "much-liked"];
