//! The `keywords` extractor: five terms an item without any model, chosen in the light of its neighbours.
//!
//! First up to three terms that the item shares with its neighbours, then terms that tell it from them. Both parts
//! stand from common to rare, so that a TID goes from the general to the specific and alike items begin alike, which
//! is what tries and sequence models live on. A term scores
//!
//! - as shared: field weight · support · √idf, where support is the share of the neighbours (weighted by similarity)
//!   that have it prominently, 0.3 of it where only their descriptions do;
//! - as distinguishing: field weight · (1 − support / 2) · √idf, less where hardly any other item has the term.
//!
//! An item with fewer than five terms of its own borrows what most of its neighbours share, and then takes its own
//! numbers and units. Items without any text get nothing. Making TIDs unique is left to [`super::collisions`].

use rayon::prelude::*;
use rustc_hash::FxHashMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    ParamIssue,
    artifact::{Item, TID_LENGTH},
    method::BuiltIn,
};

mod vocabulary;

use vocabulary::{Term, TermId, Vocabulary};

/// Settings of the `keywords` extractor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Keywords {
    /// How many of the five words are looked for among what the neighbours share.
    pub shared: usize,
    /// Neighbours whose vocabulary counts, as many as there are up to this; none if the stage's `neighbors` is 0.
    pub context: usize,
}

impl Default for Keywords {
    fn default() -> Self {
        Self { shared: 3, context: 20 }
    }
}

impl BuiltIn for Keywords {
    const NAME: &'static str = "keywords";
}

/// A shared term must have at least this much support.
const SUPPORT: f32 = 0.2;
/// A borrowed one at least this much.
const BORROWED_SUPPORT: f32 = 0.5;
/// What a term that only a neighbour's description holds counts.
const DESCRIBED: f32 = 0.3;
/// What a distinguishing term counts that one item has, that two have, and so on: a word that hardly any other item
/// has teaches nothing about others, and makes the vocabulary large.
const RARE: [f32; 4] = [0.1, 0.4, 0.6, 0.8];
/// Terms of an item's own that may stand in for others when TIDs collide.
const SPARES: usize = 24;

/// What the extractor found for an item.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Choice {
    /// Five words, or fewer if the text does not hold more.
    pub words: Vec<String>,
    /// Further words, best first.
    pub spares: Vec<String>,
}

impl Keywords {
    pub fn check(&self) -> Vec<ParamIssue> {
        if self.shared > TID_LENGTH {
            return vec![ParamIssue::new("extractor.keywords.shared", format!("at most {TID_LENGTH} words"))];
        }
        Vec::new()
    }

    /// A choice for each item; `neighbors` are places in `items` with similarities, one list an item. Runs on the
    /// current rayon pool.
    pub fn extract(&self, items: &[Item], neighbors: &[Vec<(usize, f32)>]) -> Vec<Choice> {
        let vocabulary = Vocabulary::of(items);
        (0..items.len())
            .into_par_iter()
            .map(|item| {
                let near = neighbors.get(item).map_or(&[][..], Vec::as_slice);
                self.choose(&vocabulary, &vocabulary.items[item], &support(&vocabulary, near))
            })
            .collect()
    }

    fn choose(&self, vocabulary: &Vocabulary, own: &[Term], support: &FxHashMap<TermId, f32>) -> Choice {
        let n = vocabulary.items.len() as f32;
        let frequency = |id: TermId| vocabulary.frequency[id as usize];
        let rarity = |id: TermId| ((n + 1.0) / (frequency(id) as f32 + 0.5)).ln().max(0.01).sqrt();
        let supported = |id: TermId| support.get(&id).copied().unwrap_or(0.0);
        let common = |id: TermId| RARE.get(frequency(id).saturating_sub(1) as usize).copied().unwrap_or(1.0);

        let mut picked = Picked { vocabulary, ids: Vec::new() };
        let telling = || own.iter().filter(|t| !vocabulary.filler[t.id as usize]);
        let shared = telling()
            .filter(|t| supported(t.id) >= SUPPORT)
            .map(|t| (t.id, t.weight * supported(t.id) * rarity(t.id)))
            .collect();
        picked.take(self.shared, shared);
        let general = picked.ids.len();
        let distinguishing: Vec<(TermId, f32)> =
            telling().map(|t| (t.id, t.weight * (1.0 - supported(t.id) / 2.0) * rarity(t.id) * common(t.id))).collect();
        picked.take(TID_LENGTH - general, distinguishing.clone());
        if picked.ids.len() < TID_LENGTH {
            let owns = |id: TermId| own.iter().any(|t| t.id == id);
            let mut borrowed: Vec<(TermId, f32)> = support
                .iter()
                .filter(|(id, support)| {
                    **support >= BORROWED_SUPPORT && !vocabulary.filler[**id as usize] && !owns(**id)
                })
                .map(|(id, support)| (*id, support * rarity(*id)))
                .collect();
            // Only an item that says something itself is given more words.
            borrowed.retain(|_| !own.is_empty());
            picked.take(TID_LENGTH - picked.ids.len(), borrowed);
        }
        let filler: Vec<(TermId, f32)> =
            own.iter().filter(|t| vocabulary.filler[t.id as usize]).map(|t| (t.id, t.weight * common(t.id))).collect();
        if picked.ids.len() < TID_LENGTH {
            picked.take(TID_LENGTH - picked.ids.len(), filler.clone());
        }

        let mut ids = picked.ids.clone();
        let by_frequency = |ids: &mut [TermId]| ids.sort_by_key(|id| (std::cmp::Reverse(frequency(*id)), *id));
        by_frequency(&mut ids[..general]);
        by_frequency(&mut ids[general..]);
        let mut spare = Picked { vocabulary, ids: picked.ids };
        let (known, new): (Vec<_>, Vec<_>) = distinguishing.into_iter().partition(|(id, _)| frequency(*id) >= 2);
        for candidates in [known, filler, new] {
            spare.take(SPARES, candidates);
        }
        let word = |id: &TermId| vocabulary.words[*id as usize].clone();
        Choice {
            words: ids.iter().map(word).collect(),
            spares: spare.ids.iter().skip(ids.len()).take(SPARES).map(word).collect(),
        }
    }
}

/// Terms picked so far.
struct Picked<'a> {
    vocabulary: &'a Vocabulary,
    ids: Vec<TermId>,
}

impl Picked<'_> {
    /// Adds the best `count` of `candidates`, equal ones in order of first use in the catalogue, passing over those
    /// that say what is there already.
    fn take(&mut self, count: usize, mut candidates: Vec<(TermId, f32)>) {
        candidates.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let end = self.ids.len() + count;
        for (id, _) in candidates {
            if self.ids.len() == end {
                break;
            }
            if !self.ids.iter().any(|other| self.repeats(id, *other)) {
                self.ids.push(id);
            }
        }
    }

    /// Whether one of the terms is a part of the other.
    fn repeats(&self, a: TermId, b: TermId) -> bool {
        let (a, b) = (&self.vocabulary.words[a as usize], &self.vocabulary.words[b as usize]);
        a == b || a.split('-').any(|part| part == b) || b.split('-').any(|part| part == a)
    }
}

/// The share of `neighbors`, weighted by similarity, that hold each term.
fn support(vocabulary: &Vocabulary, neighbors: &[(usize, f32)]) -> FxHashMap<TermId, f32> {
    let total: f32 = neighbors.iter().map(|(_, similarity)| similarity.max(0.0)).sum();
    let mut support = FxHashMap::default();
    if total > 0.0 {
        for &(neighbor, similarity) in neighbors {
            for term in &vocabulary.items[neighbor] {
                let share = similarity.max(0.0) / total * if term.prominent { 1.0 } else { DESCRIBED };
                *support.entry(term.id).or_insert(0.0) += share;
            }
        }
    }
    support
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn items(titles: &[&str]) -> Vec<Item> {
        let item = |(i, title): (usize, &&str)| Item::from_value(json!({"id": i.to_string(), "title": title})).unwrap();
        titles.iter().enumerate().map(item).collect()
    }

    fn all_near(n: usize) -> Vec<Vec<(usize, f32)>> {
        (0..n).map(|i| (0..n).filter(|j| *j != i).map(|j| (j, 0.5)).collect()).collect()
    }

    const TAPES: [&str; 4] = [
        "Gorilla duct tape silver strong weatherproof",
        "Scotch duct tape black outdoor strong",
        "Duck duct tape silver outdoor weatherproof",
        "Duct tape",
    ];

    #[test]
    fn shared_terms_first_then_those_that_differ() {
        let choices = Keywords::default().extract(&items(&TAPES), &all_near(4));
        // "duct tape" always stands together, so it is one term.
        assert_eq!(choices[0].words[0], "duct-tape");
        assert!(choices[0].words[3..].iter().any(|w| w == "gorilla" || w == "weatherproof"), "{:?}", choices[0].words);
        assert!(choices.iter().take(3).all(|c| c.words.len() == TID_LENGTH));
    }

    #[test]
    fn short_texts_borrow_from_neighbours_and_empty_ones_do_not() {
        let mut titles = TAPES.to_vec();
        titles.push("");
        let choices = Keywords::default().extract(&items(&titles), &all_near(5));
        assert_eq!(choices[3].words[0], "duct-tape");
        assert!(choices[4].words.is_empty());
    }

    #[test]
    fn numbers_are_the_last_resort() {
        let choices = Keywords::default().extract(&items(&["steel bolt 12 mm m8", "brass nut wrench cap plug 7"]), &[]);
        assert_eq!(choices[0].words.len(), 5);
        assert_eq!(choices[0].words[..2].iter().filter(|w| ["steel", "bolt"].contains(&w.as_str())).count(), 2);
        assert!(!choices[1].words.contains(&"7".to_owned()));
        assert_eq!(choices[1].spares, ["7"]);
    }
}
