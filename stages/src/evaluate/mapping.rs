//! The reference's mapping from generated texts to items, rule for rule, on an index instead of a scan.
//!
//! Every `[…]` of a user's beams is a query, in beam order and without repeats. A query that is a known TID stands
//! for all items of that TID. Any other is matched word by word: a vocabulary word equal to the query's word number
//! i (from 0) scores 1, one that contains it or is contained in it 0.8, both divided by i + 1, added to every TID
//! that holds the vocabulary word, once per occurrence; the best TID's first item is taken, and of equals the TID
//! that was touched first. Scores are sums of doubles taken in that very order, because a tie may hang on the last
//! bit. Lists shorter than wanted are filled with the fuzzy best of every query.
//!
//! The scan over the vocabulary is replaced by an index of byte pairs (words that contain a query word) and a look-up
//! of the query word's own substrings (words contained in it); both are kept per distinct query word, and the best TID
//! per distinct query. Reading the texts is left to the caller.

use rustc_hash::FxHashMap;

use crate::artifact::{ItemId, text::is_python_space};

type TidIndex = u32;
type WordIndex = u32;

/// `tid2item_id`, indexed. Shared by threads; each thread has a [`Memory`] of its own.
pub struct TextMapper {
    /// Items of each TID, in the order of `tid2item_id`.
    items: Vec<Vec<ItemId>>,
    /// TID, words joined by `,` → its index.
    exact: FxHashMap<String, TidIndex>,
    /// Distinct words, stripped and lower-cased, in order of first appearance.
    vocabulary: Vec<String>,
    word_index: FxHashMap<String, WordIndex>,
    /// TIDs that hold a word, once per occurrence: `postings[starts[w]..starts[w + 1]]`.
    postings: Vec<TidIndex>,
    starts: Vec<usize>,
    pairs: BytePairs,
}

/// Where in which words two bytes follow each other.
struct BytePairs {
    /// Words, ascending, and the pair's place in them: `places[starts[p]..starts[p + 1]]` for the pair `p`.
    places: Vec<(WordIndex, u32)>,
    starts: Vec<u32>,
    /// Length in bytes of the longest word that begins with the pair; 0 without one.
    longest: Vec<u32>,
}

/// A TID, once per occurrence of a word that resembles the query's word, and whether the two are equal.
#[derive(Clone, Copy)]
struct Match {
    tid: TidIndex,
    equal: bool,
}

/// What one thread remembers between queries.
#[derive(Default)]
pub struct Memory {
    matches: FxHashMap<String, Vec<Match>>,
    best: FxHashMap<String, Option<TidIndex>>,
    scores: Vec<f64>,
    touched: Vec<TidIndex>,
}

impl TextMapper {
    /// `entries` as in `tid2item_id.json`: words joined by `,`, and the items that have them. Order matters.
    pub fn new(entries: impl IntoIterator<Item = (String, Vec<ItemId>)>) -> Self {
        let (mut items, mut exact) = (Vec::new(), FxHashMap::default());
        let (mut vocabulary, mut word_index) = (Vec::<String>::new(), FxHashMap::default());
        let mut holders: Vec<Vec<TidIndex>> = Vec::new();
        for (tid, (key, ids)) in (0..).zip(entries) {
            for word in key.split(',') {
                let word = word.trim_matches(is_python_space).to_lowercase();
                let index = *word_index.entry(word).or_insert_with_key(|word| {
                    vocabulary.push(word.clone());
                    holders.push(Vec::new());
                    (vocabulary.len() - 1) as WordIndex
                });
                holders[index as usize].push(tid);
            }
            exact.insert(key, tid);
            items.push(ids);
        }
        let mut starts = vec![0];
        starts.extend(holders.iter().scan(0, |end, tids| {
            *end += tids.len();
            Some(*end)
        }));
        Self {
            items,
            exact,
            pairs: BytePairs::new(&vocabulary),
            vocabulary,
            word_index,
            postings: holders.concat(),
            starts,
        }
    }

    /// The items that `texts`, a user's beams from best to worst, stand for: at most `wanted`, without repeats.
    pub fn map<S: AsRef<str>>(&self, texts: &[S], wanted: usize, memory: &mut Memory) -> Vec<ItemId> {
        let mut queries: Vec<&str> = Vec::new();
        for query in texts.iter().flat_map(|text| bracketed(text.as_ref())) {
            if !queries.contains(&query) {
                queries.push(query);
            }
        }
        let mut found: Vec<&ItemId> = Vec::with_capacity(wanted);
        let add = |item, found: &mut Vec<_>| {
            if found.len() < wanted && !found.contains(&item) {
                found.push(item);
            }
        };
        for query in &queries {
            if let Some(&tid) = self.exact.get(&query.replace(", ", ",")) {
                for item in &self.items[tid as usize] {
                    add(item, &mut found);
                }
            } else if let Some(item) = self.fuzzy(query, memory) {
                add(item, &mut found);
            }
        }
        // The reference repeats this up to five times; after the first the list does not change any more.
        for query in &queries {
            if found.len() >= wanted {
                break;
            }
            if let Some(item) = self.fuzzy(query, memory) {
                add(item, &mut found);
            }
        }
        found.into_iter().cloned().collect()
    }

    /// The first item of the TID that resembles `query` most.
    fn fuzzy(&self, query: &str, memory: &mut Memory) -> Option<&ItemId> {
        let tid = match memory.best.get(query) {
            Some(tid) => *tid,
            None => {
                let tid = self.best_tid(query, memory);
                memory.best.insert(query.to_owned(), tid);
                tid
            }
        };
        self.items[tid? as usize].first()
    }

    fn best_tid(&self, query: &str, memory: &mut Memory) -> Option<TidIndex> {
        let Memory { matches, scores, touched, .. } = memory;
        scores.resize(self.items.len(), 0.0);
        // Every add writes its TID behind the last one, and only a first add keeps it there: no branch to mispredict.
        touched.resize(self.items.len() + 1, 0);
        let mut count = 0;
        for (place, word) in query.split(", ").enumerate() {
            let weight = 1.0 / (place + 1) as f64;
            let score = [0.8 * weight, weight];
            if !matches.contains_key(word) {
                matches.insert(word.to_owned(), self.matches(word));
            }
            for &Match { tid, equal } in &matches[word] {
                let sum = &mut scores[tid as usize];
                touched[count] = tid;
                count += usize::from(*sum == 0.0);
                *sum += score[usize::from(equal)];
            }
        }
        let mut best: Option<(TidIndex, f64)> = None;
        for &tid in &touched[..count] {
            let score = std::mem::take(&mut scores[tid as usize]);
            if best.is_none_or(|(_, highest)| score > highest) {
                best = Some((tid, score));
            }
        }
        best.map(|(tid, _)| tid)
    }

    /// The TIDs of all vocabulary words that equal `word`, contain it or are contained in it, in vocabulary order.
    fn matches(&self, word: &str) -> Vec<Match> {
        let mut found = self.containing(word);
        found.extend(self.contained(word));
        found.sort_unstable();
        found.dedup();
        let same = self.word_index.get(word);
        let tids = |index: WordIndex| &self.postings[self.starts[index as usize]..self.starts[index as usize + 1]];
        let of_word = |index| tids(index).iter().map(move |&tid| Match { tid, equal: Some(&index) == same });
        found.into_iter().flat_map(of_word).collect()
    }

    /// Vocabulary words that contain `word`, some perhaps twice: those that have its rarest pair of bytes are looked at.
    fn containing(&self, word: &str) -> Vec<WordIndex> {
        let rarest =
            byte_pairs(word).map(|pair| self.pairs.places(pair)).zip(0..).min_by_key(|(places, _)| places.len());
        let Some((places, before)) = rarest else {
            let contains = |index: &WordIndex| self.vocabulary[*index as usize].contains(word);
            return (0..self.vocabulary.len() as WordIndex).filter(contains).collect();
        };
        let fits = |&&(index, place): &&(WordIndex, u32)| {
            let start = place.checked_sub(before).map(|start| start as usize);
            start.is_some_and(|start| self.vocabulary[index as usize].as_bytes()[start..].starts_with(word.as_bytes()))
        };
        places.iter().filter(fits).map(|&(index, _)| index).collect()
    }

    /// Vocabulary words that `word` contains, some perhaps twice.
    fn contained(&self, word: &str) -> impl Iterator<Item = WordIndex> {
        let substrings = word.char_indices().flat_map(move |(start, first)| {
            let rest = &word[start..];
            let longest = byte_pairs(rest).next().map_or(0, |pair| self.pairs.longest[pair] as usize);
            let ends = first.len_utf8()..=rest.len().min(longest.max(first.len_utf8()));
            ends.filter(|&end| rest.is_char_boundary(end)).map(|end| &rest[..end])
        });
        substrings.chain([""]).filter_map(|part| self.word_index.get(part).copied())
    }
}

impl BytePairs {
    /// Counting sort of the pairs of all words.
    fn new(vocabulary: &[String]) -> Self {
        let mut starts = vec![0; PAIRS + 1];
        let mut longest = vec![0; PAIRS];
        for word in vocabulary {
            for (place, pair) in byte_pairs(word).enumerate() {
                starts[pair + 1] += 1;
                if place == 0 {
                    longest[pair] = longest[pair].max(word.len() as u32);
                }
            }
        }
        for pair in 0..PAIRS {
            starts[pair + 1] += starts[pair];
        }
        let mut places = vec![(0, 0); starts[PAIRS] as usize];
        let mut next = starts.clone();
        for (index, word) in (0..).zip(vocabulary) {
            for (pair, place) in byte_pairs(word).zip(0..) {
                places[next[pair] as usize] = (index, place);
                next[pair] += 1;
            }
        }
        Self { places, starts, longest }
    }

    fn places(&self, pair: usize) -> &[(WordIndex, u32)] {
        &self.places[self.starts[pair] as usize..self.starts[pair + 1] as usize]
    }
}

const PAIRS: usize = 1 << 16;

/// The pairs of neighbouring bytes of `word`, each as a number below [`PAIRS`].
fn byte_pairs(word: &str) -> impl Iterator<Item = usize> + '_ {
    word.as_bytes().windows(2).map(|w| usize::from(u16::from_be_bytes([w[0], w[1]])))
}

/// What stands between each `[` and the next `]` on the same line, from left to right.
pub(super) fn bracketed(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        loop {
            let inside = &rest[rest.find('[')? + 1..];
            match inside.find([']', '\n']) {
                Some(end) if inside.as_bytes()[end] == b']' => {
                    rest = &inside[end + 1..];
                    return Some(&inside[..end]);
                }
                Some(end) => rest = &inside[end + 1..],
                None => return None,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use proptest::prelude::*;
    use serde_json::{Map, Value};

    use super::*;

    fn mapper(entries: &[(&str, &[&str])]) -> TextMapper {
        TextMapper::new(
            entries.iter().map(|(key, ids)| (key.to_string(), ids.iter().map(|id| ItemId(id.to_string())).collect())),
        )
    }

    fn ids(items: Vec<ItemId>) -> Vec<String> {
        items.into_iter().map(|i| i.0).collect()
    }

    #[test]
    fn the_200_users_of_the_reference() {
        let Some(data) = std::env::var_os("GRLM_TEST_DATA").map(PathBuf::from) else {
            eprintln!("skipped: GRLM_TEST_DATA is not set");
            return;
        };
        let read = |path: &str| fs::read_to_string(data.join(path)).unwrap();
        let tids: Map<String, Value> = serde_json::from_str(&read("data/beauty/tid2item_id.json")).unwrap();
        let mapper = TextMapper::new(tids.into_iter().map(|(key, ids)| (key, serde_json::from_value(ids).unwrap())));
        let users: Vec<FxHashMap<String, Vec<String>>> =
            serde_json::from_str(&read("golden/beauty/fuzzy_mapping.json")).unwrap();
        assert_eq!(users.len(), 200);
        let mut memory = Memory::default();
        for (number, user) in users.iter().enumerate() {
            assert_eq!(ids(mapper.map(&user["contents"], 20, &mut memory)), user["iids"], "user {number}");
        }
    }

    #[test]
    fn known_tids_give_all_their_items_and_repeats_count_once() {
        let m = mapper(&[("a,b,c,d,e", &["1", "2"]), ("f,g,h,i,j", &["3"])]);
        let texts = ["x [f, g, h, i, j] Title: [a, b, c, d, e]", "[f, g, h, i, j]"];
        assert_eq!(ids(m.map(&texts, 20, &mut Memory::default())), ["3", "1", "2"]);
        assert_eq!(ids(m.map(&texts, 2, &mut Memory::default())), ["3", "1"]);
    }

    #[test]
    fn the_first_word_weighs_most_and_the_first_touched_wins_ties() {
        let m = mapper(&[("soap,bar", &["1"]), ("bar,soap", &["2"]), ("gel,bar", &["3"])]);
        assert_eq!(ids(m.map(&["[bar, gel]"], 1, &mut Memory::default())), ["3"]);
        assert_eq!(ids(m.map(&["[soap]"], 1, &mut Memory::default())), ["1"]);
        // Contained in "soapy", so 0.8.
        assert_eq!(ids(m.map(&["[soapy, zzz]"], 1, &mut Memory::default())), ["1"]);
    }

    #[test]
    fn nothing_to_read_gives_nothing() {
        let m = mapper(&[("a,b", &["1"])]);
        let none: [&str; 0] = [];
        assert!(m.map(&none, 20, &mut Memory::default()).is_empty());
        assert!(m.map(&["no brackets", "[open", "[broken\nline]", "[zzz]"], 20, &mut Memory::default()).is_empty());
        // An empty query word is contained in every word.
        assert_eq!(ids(m.map(&["[]"], 20, &mut Memory::default())), ["1"]);
        assert!(mapper(&[]).map(&["[a]"], 20, &mut Memory::default()).is_empty());
    }

    /// The rules, as prose has them: no index, no memory.
    fn naive(entries: &[(String, Vec<String>)], texts: &[String], wanted: usize) -> Vec<String> {
        let mut vocabulary: Vec<(String, Vec<usize>)> = Vec::new();
        for (tid, (key, _)) in entries.iter().enumerate() {
            for word in key.split(',') {
                let word = word.trim().to_lowercase();
                match vocabulary.iter_mut().find(|(known, _)| *known == word) {
                    Some((_, tids)) => tids.push(tid),
                    None => vocabulary.push((word, vec![tid])),
                }
            }
        }
        let fuzzy = |query: &str| -> Option<String> {
            let mut scores: Vec<(usize, f64)> = Vec::new();
            for (i, word) in query.split(", ").enumerate() {
                for (known, tids) in &vocabulary {
                    let score = if known == word {
                        1.0
                    } else if known.contains(word) || word.contains(known.as_str()) {
                        0.8
                    } else {
                        continue;
                    };
                    for &tid in tids {
                        let add = score * (1.0 / (i + 1) as f64);
                        match scores.iter_mut().find(|(t, _)| *t == tid) {
                            Some((_, sum)) => *sum += add,
                            None => scores.push((tid, add)),
                        }
                    }
                }
            }
            let highest = scores.iter().map(|(_, s)| *s).fold(f64::NEG_INFINITY, f64::max);
            let (tid, _) = scores.iter().find(|(_, s)| *s == highest)?;
            entries[*tid].1.first().cloned()
        };
        let mut queries = Vec::new();
        for text in texts {
            let mut inside: Option<String> = None;
            for c in text.chars() {
                match (&mut inside, c) {
                    (None, '[') => inside = Some(String::new()),
                    (Some(query), ']') => {
                        if !queries.contains(query) {
                            queries.push(query.clone());
                        }
                        inside = None;
                    }
                    (Some(query), c) => query.push(c),
                    (None, _) => {}
                }
            }
        }
        let mut found: Vec<String> = Vec::new();
        for query in &queries {
            match entries.iter().find(|(key, _)| *key == query.replace(", ", ",")) {
                Some((_, items)) => found.extend(items.iter().cloned()),
                None => found.extend(fuzzy(query)),
            }
        }
        let unique = |list: Vec<String>| {
            let mut kept: Vec<String> = Vec::new();
            list.into_iter().for_each(|item| {
                if !kept.contains(&item) {
                    kept.push(item);
                }
            });
            kept.truncate(wanted);
            kept
        };
        let mut found = unique(found);
        for _ in 0..5 {
            for query in &queries {
                found.extend(fuzzy(query));
            }
            found = unique(found);
        }
        found
    }

    proptest! {
        #[test]
        fn equals_the_naive_rules(
            words in prop::collection::vec(prop::collection::vec("[ab]{0,4}|é[ab]é?", 1..4), 1..12),
            texts in prop::collection::vec("\\[([ab]{0,5}|[aé]{1,3})(, [ab]{0,4}){0,3}\\]", 0..6),
            wanted in 0usize..6,
        ) {
            let mut entries: Vec<(String, Vec<String>)> = Vec::new();
            for (i, words) in words.iter().enumerate() {
                let key = words.join(",");
                if entries.iter().all(|(known, _)| *known != key) {
                    entries.push((key, vec![format!("{i}"), format!("{}", i + 1)]));
                }
            }
            let mapper = TextMapper::new(
                entries.iter().map(|(key, ids)| (key.clone(), ids.iter().cloned().map(ItemId).collect())),
            );
            let got = ids(mapper.map(&texts, wanted, &mut Memory::default()));
            prop_assert_eq!(got, naive(&entries, &texts, wanted));
        }
    }
}
