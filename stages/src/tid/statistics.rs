//! What the published script reports about a set of TIDs, number for number.
//!
//! Word counts, word counts by position, collisions, how many TIDs are whole, and whether similar items share words:
//! over all pairs of an item with one of its first five neighbours, the mean similarity, the mean number of distinct
//! words that both have, and Pearson's correlation of the two. Blank words are not counted; items without any words
//! collide with each other. Means and correlation are summed in NumPy's order (pairwise for means, fused
//! multiply-add for products), since the file is compared byte for byte.

use rustc_hash::{FxHashMap, FxHashSet};
use serde_json::{Map, Value, json};

use crate::artifact::{ItemId, Neighbor, TID_LENGTH};

/// Neighbours of an item that are compared with it.
const NEIGHBORS: usize = 5;

/// An item with its words as they stand in the `tids` file.
pub struct Entry<'a> {
    pub id: &'a ItemId,
    pub words: Vec<&'a str>,
}

/// The statistics of `entries`, in the layout of the published file. Of entries with one id, the last is the one
/// that neighbours are compared with.
pub fn statistics(entries: &[Entry], neighbors: &FxHashMap<&ItemId, &[Neighbor]>) -> Value {
    let words = || entries.iter().flat_map(|e| &e.words).filter_map(|w| nonblank(w));
    let at = |position: usize| frequencies(entries.iter().filter_map(|e| nonblank(e.words.get(position)?)));
    json!({
        "word_frequency": frequencies(words()),
        "position_frequency": (0..TID_LENGTH).map(at).collect::<Vec<_>>(),
        "conflict_analysis": conflicts(entries),
        "validity_analysis": validity(entries),
        "similarity_analysis": similarity(entries, neighbors),
    })
}

/// What the published file leaves to its readers: how many words and TIDs there are, and how many items have one of
/// their own.
pub fn summary(entries: &[Entry]) -> Value {
    let whole = |e: &&Entry| e.words.len() == TID_LENGTH && e.words.iter().all(|w| !w.is_empty());
    let words: FxHashSet<&str> = entries.iter().flat_map(|e| &e.words).filter_map(nonblank).collect();
    let valid = entries.iter().filter(whole).count();
    let tids: FxHashSet<&[&str]> = entries.iter().filter(whole).map(|e| e.words.as_slice()).collect();
    let share = |part: usize, of: usize| if of == 0 { 0.0 } else { part as f64 / of as f64 };
    json!({
        "items": entries.len(),
        "valid_share": share(valid, entries.len()),
        "distinct_words": words.len(),
        "distinct_tids": tids.len(),
        "collision_rate": share(valid - tids.len(), valid),
    })
}

fn nonblank<'a>(word: &&'a str) -> Option<&'a str> {
    (!word.is_empty()).then_some(*word)
}

/// Counts, highest first; equal counts in order of first appearance.
fn frequencies<'a>(words: impl Iterator<Item = &'a str>) -> Map<String, Value> {
    let mut counts = counted(words);
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    counts.into_iter().map(|(word, count)| (word.to_owned(), json!(count))).collect()
}

/// Distinct values with their counts, in order of first appearance.
fn counted<T: Clone + std::hash::Hash + Eq>(values: impl Iterator<Item = T>) -> Vec<(T, u64)> {
    let mut places: FxHashMap<T, usize> = FxHashMap::default();
    let mut counts: Vec<(T, u64)> = Vec::new();
    for value in values {
        let place = *places.entry(value).or_insert_with_key(|value| {
            counts.push((value.clone(), 0));
            counts.len() - 1
        });
        counts[place].1 += 1;
    }
    counts
}

fn conflicts(entries: &[Entry]) -> Value {
    let mut repeated = counted(entries.iter().map(|e| e.words.as_slice()));
    repeated.retain(|(_, count)| *count > 1);
    let total: u64 = repeated.iter().map(|(_, count)| count - 1).sum();
    let rate = if entries.is_empty() { json!(0) } else { json!(total as f64 / entries.len() as f64) };
    json!({"total_conflicts": total, "conflict_rate": rate, "duplicate_tuples": repeated})
}

fn validity(entries: &[Entry]) -> Value {
    let (mut valid, mut partial) = (0, 0);
    for entry in entries {
        match entry.words.iter().filter(|w| !w.is_empty()).count() {
            TID_LENGTH => valid += 1,
            0 => {}
            _ => partial += 1,
        }
    }
    json!({"valid_items": valid, "partial_items": partial, "invalid_items": entries.len() - valid - partial})
}

fn similarity(entries: &[Entry], neighbors: &FxHashMap<&ItemId, &[Neighbor]>) -> Value {
    let distinct: Vec<FxHashSet<&str>> =
        entries.iter().map(|e| e.words.iter().copied().filter(|w| !w.is_empty()).collect()).collect();
    let last: FxHashMap<&ItemId, usize> = entries.iter().enumerate().map(|(i, e)| (e.id, i)).collect();
    let (mut similarities, mut shared) = (Vec::new(), Vec::new());
    for (entry, words) in entries.iter().zip(&distinct) {
        for neighbor in neighbors.get(entry.id).copied().unwrap_or_default().iter().take(NEIGHBORS) {
            if let Some(&other) = last.get(&neighbor.id) {
                similarities.push(neighbor.score);
                shared.push(words.intersection(&distinct[other]).count() as f64);
            }
        }
    }
    if similarities.is_empty() {
        return json!({"avg_similarity": 0, "avg_shared_words": 0, "correlation": 0});
    }
    let correlation = if similarities.len() > 1 { correlation(&similarities, &shared) } else { Some(0.0) };
    json!({
        "avg_similarity": mean(&similarities),
        "avg_shared_words": mean(&shared),
        // Without any spread there is none; JSON has no NaN.
        "correlation": correlation,
    })
}

fn mean(values: &[f64]) -> f64 {
    pairwise_sum(values) / values.len() as f64
}

/// NumPy's summation: eight running sums for up to 128 values, halves above.
fn pairwise_sum(values: &[f64]) -> f64 {
    const LANES: usize = 8;
    const BLOCK: usize = 128;
    if values.len() < LANES {
        return values.iter().fold(0.0, |sum, v| sum + v);
    }
    if values.len() <= BLOCK {
        let mut lanes = [0.0; LANES];
        let chunks = values.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane += value;
            }
        }
        let [a, b, c, d, e, f, g, h] = lanes;
        let sum = ((a + b) + (c + d)) + ((e + f) + (g + h));
        return rest.iter().fold(sum, |sum, v| sum + v);
    }
    let half = values.len() / 2;
    let (left, right) = values.split_at(half - half % LANES);
    pairwise_sum(left) + pairwise_sum(right)
}

/// Pearson's correlation; `None` if either side has no spread.
fn correlation(x: &[f64], y: &[f64]) -> Option<f64> {
    let centred = |values: &[f64]| {
        let mean = mean(values);
        values.iter().map(|v| v - mean).collect::<Vec<f64>>()
    };
    let (x, y) = (centred(x), centred(y));
    let scale = 1.0 / (x.len() - 1) as f64;
    let covariance = |a: &[f64], b: &[f64]| a.iter().zip(b).fold(0.0, |sum: f64, (a, b)| a.mul_add(*b, sum)) * scale;
    let correlation = covariance(&x, &y) / covariance(&x, &x).sqrt() / covariance(&y, &y).sqrt();
    correlation.is_finite().then(|| correlation.clamp(-1.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        artifact::{neighbors, python_json, tids},
        testing::shared_data,
    };

    #[test]
    fn the_file_of_the_reference() {
        let Some(data) = shared_data() else { return };
        let quirks = data.join("golden/quirks");
        let records = tids::read(&quirks.join("summaries_with_similarity.jsonl")).unwrap();
        let neighbors = neighbors::read(&quirks.join("similarities.json")).unwrap();
        let entries: Vec<Entry> = records.iter().map(|r| Entry { id: r.id(), words: r.words().collect() }).collect();
        let by_id = neighbors.iter().map(|n| (&n.id, n.neighbors.as_slice())).collect();
        let mut written = Vec::new();
        python_json::write_pretty(&mut written, &statistics(&entries, &by_id), 0);
        let expected = std::fs::read_to_string(quirks.join("expected/statistics_with_similarity.json")).unwrap();
        assert_eq!(String::from_utf8(written).unwrap(), expected.trim_end());
    }

    #[test]
    fn nothing_to_compare_gives_zeros() {
        let id = ItemId("1".into());
        let entries = [Entry { id: &id, words: vec!["a", "", "c"] }];
        let report = statistics(&entries, &FxHashMap::default());
        assert_eq!(report["similarity_analysis"]["correlation"], 0);
        assert_eq!(report["validity_analysis"], json!({"valid_items": 0, "partial_items": 1, "invalid_items": 0}));
        assert_eq!(report["word_frequency"], json!({"a": 1, "c": 1}));
        assert_eq!(statistics(&[], &FxHashMap::default())["conflict_analysis"]["conflict_rate"], 0);
    }

    #[test]
    fn a_summary_counts_whole_tids() {
        let id = ItemId("1".into());
        let entry = |words: &'static str| Entry { id: &id, words: words.split(' ').collect() };
        let entries = [entry("a b c d e"), entry("a b c d e"), entry("a b c d f"), entry("a b  d e"), entry("")];
        let expected = json!({
            "items": 5, "valid_share": 0.6, "distinct_words": 6, "distinct_tids": 2, "collision_rate": 1.0 / 3.0,
        });
        assert_eq!(summary(&entries), expected);
        assert_eq!(summary(&[])["collision_rate"], 0.0);
    }

    #[test]
    fn sums_as_plain_ones_where_those_are_exact() {
        for n in [0, 3, 8, 100, 129, 1000] {
            let values: Vec<f64> = (0..n).map(f64::from).collect();
            assert_eq!(pairwise_sum(&values), values.iter().sum::<f64>());
        }
        assert_eq!(correlation(&[1.0, 2.0, 3.0], &[2.0, 4.0, 6.0]), Some(1.0));
        assert_eq!(correlation(&[1.0, 2.0], &[5.0, 5.0]), None);
    }
}
