//! The `tfidf` encoder: sparse vectors of a catalogue's own words, and exact cosine top-k over them.
//!
//! A text is the terms of title, description, categories and brand (see [`crate::terms`]), without stop words; a
//! title term counts `title_weight` times. With tf the count of a term in an item, n items, and df items that hold
//! the term: weight = (1 + ln tf) · (1 + ln((1 + n) / (1 + df))), then divided by the vector's Euclidean length
//! (the usual sublinear, smoothed form: Manning, Raghavan and Schütze, *Introduction to Information Retrieval*, ch. 6).
//! Terms in fewer than `min_df` items or more than a share `max_df` of them are left out.
//!
//! Cosines are summed term by term through an inverted index, a row at a time in ascending order of terms: the same
//! order for any number of threads.

use grlm_nn::nearest::Best;
use rayon::prelude::*;
use rustc_hash::FxHashMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    ParamIssue,
    artifact::Item,
    method::BuiltIn,
    terms::{is_stop_word, terms},
};

/// Settings of the `tfidf` encoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Tfidf {
    /// How often a word of the title counts.
    pub title_weight: u32,
    /// Leaves out words that fewer items than this hold: a word of one item makes it similar to no other.
    pub min_df: u32,
    /// Leaves out words that more than this share of items hold.
    pub max_df: f64,
}

impl Default for Tfidf {
    fn default() -> Self {
        Self { title_weight: 3, min_df: 2, max_df: 0.3 }
    }
}

impl BuiltIn for Tfidf {
    const NAME: &'static str = "tfidf";
}

/// Below this many items no word is left out for being common: in a handful of items, all are.
const SMALL_CATALOGUE: usize = 20;

impl Tfidf {
    /// The fields that make an item's text, the title first.
    pub const FIELDS: [&str; 4] = ["title", "description", "categories", "brand"];

    pub fn check(&self) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        if self.title_weight == 0 {
            issues.push(ParamIssue::new("encoder.tfidf.title_weight", "must be at least 1"));
        }
        if !(self.max_df > 0.0 && self.max_df <= 1.0) {
            issues.push(ParamIssue::new("encoder.tfidf.max_df", "must be a share above 0 and at most 1"));
        }
        issues
    }

    /// One unit vector an item (empty for an item without usable words), as sorted `(term, weight)`. Runs on the
    /// current rayon pool.
    pub fn encode(&self, items: &[Item]) -> Vec<Vec<(u32, f32)>> {
        let counts: Vec<FxHashMap<String, u32>> = items.par_iter().map(|item| self.count(item)).collect();
        let mut frequency: FxHashMap<&str, u32> = FxHashMap::default();
        for term in counts.iter().flat_map(|c| c.keys()) {
            *frequency.entry(term).or_default() += 1;
        }
        let n = items.len() as f64;
        let common = if items.len() < SMALL_CATALOGUE { n } else { self.max_df * n };
        let mut kept: Vec<(&str, u32)> =
            frequency.into_iter().filter(|(_, df)| *df >= self.min_df && f64::from(*df) <= common).collect();
        kept.sort_unstable();
        let numbered: FxHashMap<&str, (u32, f64)> = (0..)
            .zip(kept)
            .map(|(number, (term, df))| (term, (number, 1.0 + ((1.0 + n) / (1.0 + f64::from(df))).ln())))
            .collect();
        counts
            .par_iter()
            .map(|counts| {
                let mut vector: Vec<(u32, f64)> = counts
                    .iter()
                    .filter_map(|(term, &tf)| {
                        let (number, idf) = numbered.get(term.as_str())?;
                        Some((*number, (1.0 + f64::from(tf).ln()) * idf))
                    })
                    .collect();
                vector.sort_unstable_by_key(|(number, _)| *number);
                let length = vector.iter().map(|(_, w)| w * w).sum::<f64>().sqrt();
                vector.into_iter().map(|(number, weight)| (number, (weight / length) as f32)).collect()
            })
            .collect()
    }

    fn count(&self, item: &Item) -> FxHashMap<String, u32> {
        let mut counts = FxHashMap::default();
        for (place, field) in Self::FIELDS.into_iter().enumerate() {
            let weight = if place == 0 { self.title_weight } else { 1 };
            let Some(text) = item.text(field) else { continue };
            for term in terms(&text) {
                if !is_stop_word(&term) {
                    *counts.entry(term).or_default() += weight;
                }
            }
        }
        counts
    }
}

/// For each sparse row, the `k` other rows with the largest dot product above 0, best first, equal ones in order of
/// index. Runs on the current rayon pool.
pub fn top_k(rows: &[Vec<(u32, f32)>], k: usize) -> Vec<Vec<(u32, f32)>> {
    let terms = rows.iter().flatten().map(|(term, _)| *term as usize + 1).max().unwrap_or(0);
    let mut index: Vec<Vec<(u32, f32)>> = vec![Vec::new(); terms];
    for (row, vector) in (0..).zip(rows) {
        for &(term, weight) in vector {
            index[term as usize].push((row, weight));
        }
    }
    rows.par_iter()
        .enumerate()
        .map_init(
            || vec![0.0f32; rows.len()],
            |scores, (own, vector)| {
                for &(term, weight) in vector {
                    for &(row, other) in &index[term as usize] {
                        scores[row as usize] += weight * other;
                    }
                }
                scores[own] = 0.0;
                let mut best = Best::new(k);
                for (row, score) in (0..).zip(scores.iter_mut()) {
                    if *score > 0.0 {
                        best.offer(row, std::mem::take(score));
                    }
                }
                best.into_sorted()
            },
        )
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn items(titles: &[&str]) -> Vec<Item> {
        titles
            .iter()
            .enumerate()
            .map(|(i, title)| Item::from_value(json!({"id": i.to_string(), "title": title})).unwrap())
            .collect()
    }

    #[test]
    fn weights_by_hand() {
        let items = items(&["red soap", "red gel soap", "blue gel"]);
        let vectors = Tfidf { title_weight: 1, min_df: 2, max_df: 1.0 }.encode(&items);
        // gel, red and soap are in two items each, so they weigh the same; blue is in one and left out.
        let half = 1.0 / 2f32.sqrt();
        assert_eq!(vectors[0], [(1, half), (2, half)]);
        let third = 1.0 / 3f32.sqrt();
        assert_eq!(vectors[1].iter().map(|(t, _)| *t).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(vectors[1].iter().all(|(_, w)| (w - third).abs() < 1e-6));
        assert_eq!(vectors[2], [(0, 1.0)]);
    }

    #[test]
    fn rarer_and_repeated_words_weigh_more() {
        let items = items(&["red soap soap soap", "red soap", "red gel", "red gel soap"]);
        let vectors = Tfidf { title_weight: 1, min_df: 1, max_df: 1.0 }.encode(&items);
        let (red, soap) = (vectors[0][0].1, vectors[0][1].1);
        let idf = |df: f32| 1.0 + (5.0 / (1.0 + df)).ln();
        assert!((soap / red - (1.0 + 3f32.ln()) * idf(3.0) / idf(4.0)).abs() < 1e-5);
    }

    #[test]
    fn items_without_words_have_no_neighbours() {
        let vectors = Tfidf::default().encode(&items(&["the of", "red soap", "soap red", ""]));
        let found = top_k(&vectors, 3);
        assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [0, 1, 1, 0]);
        assert_eq!((found[1][0].0, found[2][0].0), (2, 1));
        assert!((found[1][0].1 - 1.0).abs() < 1e-6);
    }

    proptest! {
        #[test]
        fn equals_comparing_all_pairs(
            rows in prop::collection::vec(prop::collection::btree_map(0u32..12, 1u8..6, 0..6), 0..40),
            k in 0usize..6,
        ) {
            let rows: Vec<Vec<(u32, f32)>> =
                rows.into_iter().map(|r| r.into_iter().map(|(t, w)| (t, f32::from(w))).collect()).collect();
            let got = top_k(&rows, k);
            for (i, row) in rows.iter().enumerate() {
                let dot = |other: &Vec<(u32, f32)>| -> f32 {
                    row.iter().flat_map(|(t, w)| other.iter().filter(move |(u, _)| u == t).map(move |(_, v)| w * v)).sum()
                };
                let mut all: Vec<(u32, f32)> = rows
                    .iter()
                    .enumerate()
                    .filter(|(j, _)| *j != i)
                    .map(|(j, other)| (j as u32, dot(other)))
                    .filter(|(_, score)| *score > 0.0)
                    .collect();
                all.sort_by(|a, b| b.1.total_cmp(&a.1));
                all.truncate(k);
                prop_assert_eq!(&got[i], &all);
            }
        }
    }
}
