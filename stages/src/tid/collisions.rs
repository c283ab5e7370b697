//! Makes TIDs unique where the items' texts allow it.
//!
//! Items are taken in catalogue order; the first with a TID keeps it. A later one gives up its last word, then its
//! last two, for the first of its spare words that make its TID unique: the beginning, by which it is found among
//! its like, stays. Items whose texts hold nothing else keep the shared TID.

use rustc_hash::FxHashSet;

use super::keywords::Choice;
use crate::artifact::TID_LENGTH;

/// Changes words in `choices` until no two TIDs are equal or nothing is left to try; `taken` are TIDs that are given.
/// Returns how many items still share theirs.
pub fn resolve(choices: &mut [Choice], taken: impl IntoIterator<Item = Vec<String>>) -> usize {
    let mut taken: FxHashSet<Vec<String>> = taken.into_iter().collect();
    let mut unresolved = 0;
    for choice in choices.iter_mut().filter(|c| c.words.len() == TID_LENGTH) {
        if taken.contains(&choice.words) {
            match alternative(choice, &taken) {
                Some(words) => choice.words = words,
                None => unresolved += 1,
            }
        }
        taken.insert(choice.words.clone());
    }
    unresolved
}

fn alternative(choice: &Choice, taken: &FxHashSet<Vec<String>>) -> Option<Vec<String>> {
    let last = TID_LENGTH - 1;
    let spares: Vec<&String> = choice.spares.iter().filter(|s| !choice.words.contains(s)).collect();
    let mut words = choice.words.clone();
    for spare in &spares {
        words[last] = (*spare).clone();
        if !taken.contains(&words) {
            return Some(words);
        }
    }
    for (i, first) in spares.iter().enumerate() {
        for second in &spares[i + 1..] {
            words[last - 1] = (*first).clone();
            words[last] = (*second).clone();
            if !taken.contains(&words) {
                return Some(words);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(words: &str, spares: &str) -> Choice {
        let list = |text: &str| text.split_whitespace().map(str::to_owned).collect();
        Choice { words: list(words), spares: list(spares) }
    }

    fn tids(choices: &[Choice]) -> Vec<String> {
        choices.iter().map(|c| c.words.join(" ")).collect()
    }

    #[test]
    fn later_items_change_from_the_end() {
        let mut choices = vec![
            choice("a b c d e", "x"),
            choice("a b c d e", "x y"),
            choice("a b c d e", "x y"),
            choice("a b c d e", "x y z"),
            choice("a b c d e", "y x"),
            choice("a b", ""),
            choice("a b", ""),
        ];
        let left = resolve(&mut choices, []);
        assert_eq!(tids(&choices), ["a b c d e", "a b c d x", "a b c d y", "a b c d z", "a b c y x", "a b", "a b"]);
        assert_eq!(left, 0);
    }

    #[test]
    fn equal_texts_stay_equal_and_are_counted() {
        let mut choices = vec![choice("a b c d e", "e"), choice("a b c d e", "")];
        assert_eq!(resolve(&mut choices, []), 1);
        assert_eq!(choices[0], choice("a b c d e", "e"));
    }

    #[test]
    fn given_tids_are_not_touched() {
        let mut choices = vec![choice("a b c d e", "x")];
        resolve(&mut choices, [choice("a b c d e", "").words]);
        assert_eq!(tids(&choices), ["a b c d x"]);
    }
}
