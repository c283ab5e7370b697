//! The vocabulary of a catalogue for the keywords extractor: which terms each item has, where, and how common they
//! are. What is chosen from it is left to [`super`].
//!
//! Two words that mostly stand side by side (`heat shrink`) are one hyphenated term; a brand is one term however many
//! words it has. Phrases end at punctuation, so that no term is made across a comma.

use rayon::prelude::*;
use rustc_hash::{FxHashMap, FxHashSet};

use crate::{
    artifact::Item,
    terms::{is_stop_word, terms},
};

pub type TermId = u32;

/// Units, packaging and praise: in almost every title, and never what a product is.
const FILLER: &[&str] = &[
    "assorted",
    "assortment",
    "available",
    "best",
    "big",
    "bonus",
    "box",
    "brand",
    "case",
    "cm",
    "count",
    "ct",
    "deal",
    "design",
    "designed",
    "different",
    "dozen",
    "each",
    "easily",
    "easy",
    "edition",
    "ensure",
    "excellent",
    "extra",
    "fast",
    "feature",
    "featuring",
    "feet",
    "first",
    "fit",
    "fl",
    "foot",
    "free",
    "ft",
    "gallon",
    "genuine",
    "gift",
    "good",
    "gram",
    "great",
    "guaranteed",
    "help",
    "high",
    "ideal",
    "improved",
    "inch",
    "include",
    "including",
    "item",
    "kg",
    "large",
    "lb",
    "length",
    "long",
    "lot",
    "medium",
    "meter",
    "mil",
    "mini",
    "ml",
    "mm",
    "model",
    "need",
    "new",
    "number",
    "old",
    "original",
    "ounce",
    "oz",
    "pack",
    "package",
    "pair",
    "pc",
    "pcs",
    "perfect",
    "piece",
    "pkg",
    "please",
    "pound",
    "premium",
    "product",
    "provide",
    "quality",
    "quantity",
    "ready",
    "regular",
    "retail",
    "sale",
    "second",
    "short",
    "single",
    "size",
    "small",
    "special",
    "standard",
    "style",
    "super",
    "three",
    "top",
    "total",
    "two",
    "type",
    "ultra",
    "unit",
    "value",
    "version",
    "volt",
    "want",
    "warranty",
    "way",
    "well",
    "wide",
    "width",
    "work",
    "yard",
    "yd",
    "year",
    "best",
    "set",
    "four",
    "five",
    "six",
    "ten",
    "using",
    "amazon",
    "customer",
    "buy",
    "material",
    "manufactured",
    "country",
    "origin",
    "china",
    "usa",
    "description",
    "specification",
    "name",
    "color",
];

/// How much the field that names a term says about the product.
const TITLE: f32 = 1.0;
const CATEGORIES: f32 = 1.0;
const BRAND: f32 = 0.8;
const DESCRIPTION: f32 = 0.3;

/// Two words are one term if the pair is seen this often, …
const PAIR_COUNT: u32 = 4;
/// … if this share of the rarer word's uses is the pair, …
const PAIR_OF_RARER: f32 = 0.6;
/// … and this share of the more common one's.
const PAIR_OF_COMMONER: f32 = 0.3;

/// Words of a brand that are kept.
const BRAND_WORDS: usize = 2;

/// A term of an item.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Term {
    pub id: TermId,
    /// By the most telling field that names it, a little more if it is repeated.
    pub weight: f32,
    /// In the title, the categories or the brand.
    pub prominent: bool,
}

/// All terms of a catalogue.
pub struct Vocabulary {
    pub words: Vec<String>,
    /// Items that hold a term anywhere.
    pub frequency: Vec<u32>,
    /// Numbers, sizes, units and the like: terms of the last resort.
    pub filler: Vec<bool>,
    /// Each item's distinct terms, in order of first appearance, title first.
    pub items: Vec<Vec<Term>>,
}

/// An item's phrases, field by field.
struct Fields {
    title: Vec<Vec<String>>,
    categories: Vec<Vec<String>>,
    description: Vec<Vec<String>>,
    brand: Option<String>,
}

impl Vocabulary {
    /// Runs on the current rayon pool.
    pub fn of(items: &[Item]) -> Self {
        let mut fields: Vec<Fields> = items.par_iter().map(Fields::of).collect();
        let pairs = collocations(&fields);
        fields.par_iter_mut().for_each(|f| {
            for phrase in f.title.iter_mut().chain(&mut f.categories).chain(&mut f.description) {
                join_pairs(phrase, &pairs);
            }
        });

        let mut vocabulary = Self { words: Vec::new(), frequency: Vec::new(), filler: Vec::new(), items: Vec::new() };
        let mut ids: FxHashMap<String, TermId> = FxHashMap::default();
        for fields in fields {
            let terms = vocabulary.terms_of(fields, &mut ids);
            terms.iter().for_each(|t| vocabulary.frequency[t.id as usize] += 1);
            vocabulary.items.push(terms);
        }
        vocabulary
    }

    fn terms_of(&mut self, fields: Fields, ids: &mut FxHashMap<String, TermId>) -> Vec<Term> {
        let mut found: Vec<Term> = Vec::new();
        let mut places: FxHashMap<TermId, usize> = FxHashMap::default();
        let sections = [(fields.title, TITLE), (fields.categories, CATEGORIES), (fields.description, DESCRIPTION)];
        let brand = fields.brand.map(|brand| (vec![vec![brand]], BRAND));
        for (phrases, weight) in brand.into_iter().chain(sections) {
            for word in phrases.into_iter().flatten().filter(|w| !is_stop_word(w)) {
                let id = *ids.entry(word).or_insert_with_key(|word| {
                    self.words.push(word.clone());
                    self.frequency.push(0);
                    self.filler.push(is_filler(word));
                    (self.words.len() - 1) as TermId
                });
                let place = *places.entry(id).or_insert_with(|| {
                    found.push(Term { id, weight: 0.0, prominent: false });
                    found.len() - 1
                });
                let term = &mut found[place];
                term.weight = if term.weight == 0.0 { weight } else { term.weight.max(weight) + 0.05 };
                term.prominent |= weight > DESCRIPTION;
            }
        }
        found
    }
}

impl Fields {
    fn of(item: &Item) -> Self {
        let phrases = |field: &str| item.text(field).map(|text| phrases(&text)).unwrap_or_default();
        let brand: Option<Vec<String>> = item
            .brand()
            .map(|brand| terms(&brand).into_iter().filter(|t| !is_stop_word(t)).take(BRAND_WORDS).collect());
        let mut title = phrases("title");
        let brand = brand.filter(|words| !words.is_empty()).map(|words| {
            let joined = words.join("-");
            for phrase in &mut title {
                while let Some(at) = phrase.windows(words.len()).position(|w| w == words.as_slice()) {
                    if words.len() == 1 {
                        break;
                    }
                    phrase.splice(at..at + words.len(), [joined.clone()]);
                }
            }
            joined
        });
        Self { title, categories: phrases("categories"), description: phrases("description"), brand }
    }
}

/// The terms of `text`, phrase by phrase.
fn phrases(text: &str) -> Vec<Vec<String>> {
    text.split([',', ';', ':', '|', '(', ')', '[', ']', '/', '–', '—', '.', '!', '?', '\n', '"', '*', '•'])
        .flat_map(|part| part.split(" - "))
        .map(terms)
        .filter(|phrase| !phrase.is_empty())
        .collect()
}

fn is_filler(word: &str) -> bool {
    let letters = word.chars().filter(|c| c.is_alphabetic()).count();
    letters < 3 || word.chars().any(|c| c.is_ascii_digit()) || FILLER.contains(&word)
}

/// Whether a word may be a part of a hyphenated term.
fn joins(word: &str) -> bool {
    word.chars().all(char::is_alphabetic) && word.chars().count() > 1 && !is_stop_word(word) && !FILLER.contains(&word)
}

/// Pairs of words that are one term, found in titles and categories.
fn collocations(fields: &[Fields]) -> FxHashSet<(String, String)> {
    let mut words: FxHashMap<&str, u32> = FxHashMap::default();
    let mut pairs: FxHashMap<(&str, &str), u32> = FxHashMap::default();
    for phrase in fields.iter().flat_map(|f| f.title.iter().chain(&f.categories)) {
        for word in phrase {
            *words.entry(word).or_default() += 1;
        }
        for pair in phrase.windows(2).filter(|p| joins(&p[0]) && joins(&p[1]) && p[0] != p[1]) {
            *pairs.entry((&pair[0], &pair[1])).or_default() += 1;
        }
    }
    let strong = |(a, b): &(&str, &str), count: u32| {
        let (a, b) = (words[a], words[b]);
        let share = |of: u32| count as f32 / of as f32;
        count >= PAIR_COUNT && share(a.min(b)) >= PAIR_OF_RARER && share(a.max(b)) >= PAIR_OF_COMMONER
    };
    pairs.iter().filter(|(pair, count)| strong(pair, **count)).map(|((a, b), _)| ((*a).into(), (*b).into())).collect()
}

fn join_pairs(phrase: &mut Vec<String>, pairs: &FxHashSet<(String, String)>) {
    let mut joined: Vec<String> = Vec::with_capacity(phrase.len());
    let mut words = std::mem::take(phrase).into_iter().peekable();
    while let Some(word) = words.next() {
        match words.next_if(|next| pairs.contains(&(word.clone(), next.clone()))) {
            Some(next) => joined.push(format!("{word}-{next}")),
            None => joined.push(word),
        }
    }
    *phrase = joined;
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn words(vocabulary: &Vocabulary, item: usize) -> Vec<&str> {
        vocabulary.items[item].iter().map(|t| vocabulary.words[t.id as usize].as_str()).collect()
    }

    #[test]
    fn pairs_that_stand_together_are_one_term() {
        let items: Vec<Item> = ["red", "blue", "black", "white", "thin"]
            .iter()
            .map(|c| Item::from_value(json!({"id": c, "title": format!("Heat-Shrink Tube, {c} tube")})).unwrap())
            .collect();
        let vocabulary = Vocabulary::of(&items);
        assert_eq!(words(&vocabulary, 0), ["heat-shrink", "tube", "red"]);
        assert_eq!(vocabulary.frequency[vocabulary.items[0][0].id as usize], 5);
    }

    #[test]
    fn a_brand_is_one_term_and_stop_words_are_none() {
        let item = json!({"id": "1", "title": "General Tools 147 Caliper with the LCD", "brand": "General Tools Inc"});
        let vocabulary = Vocabulary::of(&[Item::from_value(item).unwrap()]);
        assert_eq!(words(&vocabulary, 0), ["general-tool", "147", "caliper", "lcd"]);
        let filler: Vec<bool> = vocabulary.items[0].iter().map(|t| vocabulary.filler[t.id as usize]).collect();
        assert_eq!(filler, [false, true, false, false]);
    }

    #[test]
    fn the_title_weighs_more_than_the_description() {
        let item = json!({"id": "1", "title": "Gel", "description": "A shiny gel."});
        let vocabulary = Vocabulary::of(&[Item::from_value(item).unwrap()]);
        assert_eq!(words(&vocabulary, 0), ["gel", "shiny"]);
        let terms = &vocabulary.items[0];
        assert!(terms[0].prominent && !terms[1].prominent && terms[0].weight > terms[1].weight);
    }
}
