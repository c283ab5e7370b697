//! From a model's answer to the words of a TID.
//!
//! `reference` gives what the published script takes from an answer: up to five words, blanks included, padded with
//! blanks; nothing for an empty answer. `fixed` differs: blank words are left out and not made up, list numbers,
//! quotes of any kind and a leading label are taken away, words of several parts are hyphenated, and an answer
//! without five words is an [`Unusable`] one, to be asked for again or reported.

use crate::artifact::{TID_LENGTH, text::is_python_space};

/// Why an answer holds no TID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} of {TID_LENGTH} words in the answer", words.len())]
pub struct Unusable {
    /// What could be read.
    pub words: Vec<String>,
}

/// Quotes and brackets that the published script takes away at both ends of a word.
const REFERENCE_MARKS: [char; 5] = ['"', '\'', '\\', '[', ']'];

/// The published script's words: none for an empty answer, five otherwise, some of which may be blank.
pub fn reference(answer: &str) -> Vec<String> {
    let answer = answer.trim_matches('\n');
    if answer.is_empty() {
        return Vec::new();
    }
    let bare = |word: &str| strip(word).to_lowercase().trim_matches(REFERENCE_MARKS).to_owned();
    let mut words: Vec<String> = match first_brackets(answer) {
        Some(inside) => pieces(inside).map(bare).collect(),
        None => bracketed_line(answer)
            .map(|inside| {
                pieces(inside).map(|w| strip(w).to_lowercase().trim_matches(['"', '\'']).to_owned()).collect()
            })
            .filter(|words: &Vec<String>| !words.is_empty())
            .unwrap_or_else(|| pieces(answer).map(bare).collect()),
    };
    words.resize(TID_LENGTH, String::new());
    words
}

/// The text of a model's answer as the published file keeps it.
pub fn reference_output(answer: &str) -> &str {
    answer.trim_matches('\n')
}

/// Five words, none blank, without white space, commas or brackets.
///
/// # Errors
/// Fewer than five words could be read.
pub fn fixed(answer: &str) -> Result<[String; TID_LENGTH], Unusable> {
    let inside = first_brackets(answer).unwrap_or(answer);
    let inside = inside.trim();
    // "Words: a, b, …" and the like: a label is a first line or word that ends in a colon.
    let inside = match inside.split_once(':') {
        Some((label, rest)) if !label.contains([',', '\n']) && !rest.trim().is_empty() => rest,
        _ => inside,
    };
    let listed = inside.lines().filter(|l| !l.trim().is_empty()).count() >= TID_LENGTH;
    let parts: Vec<&str> = if inside.contains([',', ';']) {
        inside.split([',', ';', '\n']).collect()
    } else if listed {
        inside.lines().collect()
    } else {
        inside.split_whitespace().collect()
    };
    let words: Vec<String> = parts.into_iter().map(clean).filter(|w| !w.is_empty()).take(TID_LENGTH).collect();
    <[String; TID_LENGTH]>::try_from(words).map_err(|words| Unusable { words })
}

/// A word without marks around it and without the number of a list, in lower case, parts joined by hyphens.
pub fn clean(word: &str) -> String {
    let mark = |c: char| c != '%' && c != '+' && c != '#' && !c.is_alphanumeric();
    let word = word.trim_matches(mark);
    let numbered = word.trim_start_matches(|c: char| c.is_ascii_digit());
    let word = match numbered.strip_prefix(['.', ')', ':']) {
        Some(rest) if numbered.len() < word.len() && rest.starts_with(char::is_whitespace) => rest.trim_matches(mark),
        _ => word,
    };
    let word = word.to_lowercase().replace(['[', ']', ','], " ");
    word.split_whitespace().collect::<Vec<_>>().join("-")
}

fn strip(word: &str) -> &str {
    word.trim_matches(is_python_space)
}

/// The parts between commas, or between white space if there is no comma.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let commas = text.contains(',');
    let (by_comma, by_space) = (commas.then(|| text.split(',')), (!commas).then(|| text.split(is_python_space)));
    by_comma.into_iter().flatten().chain(by_space.into_iter().flatten().filter(|w| !w.is_empty()))
}

/// What stands, over one or more lines, between the first `[` and the next `]` with something in between.
fn first_brackets(text: &str) -> Option<&str> {
    text.match_indices('[').find_map(|(open, _)| {
        let inside = &text[open + 1..];
        let close = inside.find(']')?;
        (close > 0).then(|| &inside[..close])
    })
}

/// The inside of the first line that begins with `[` and ends with `]`.
fn bracketed_line(text: &str) -> Option<&str> {
    strip(text).split('\n').map(strip).find_map(|line| line.strip_prefix('[')?.strip_suffix(']'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;
    use crate::testing::shared_data;

    #[derive(Deserialize)]
    struct Case {
        raw: String,
        words: Vec<String>,
        llm_output: String,
    }

    #[test]
    fn the_answers_of_the_reference() {
        let Some(data) = shared_data() else { return };
        let cases: Vec<Case> =
            serde_json::from_slice(&std::fs::read(data.join("golden/tid_parse.json")).unwrap()).unwrap();
        assert_eq!(cases.len(), 35);
        for case in cases {
            assert_eq!(reference(&case.raw), case.words, "{:?}", case.raw);
            assert_eq!(reference_output(&case.raw), case.llm_output);
        }
    }

    #[test]
    fn fixed_reads_what_people_would() {
        for answer in [
            "[a, b, c, d, e]",
            "Here you go: [A, \"b\", ‘c’, d., e] [x]",
            "a, b, c, d, e, f",
            "[[a, b, c, d, e]]",
            "[a b c d e]",
            "[a, , b, c, d, e]",
            "[a; b; c; d; e]",
            "1. a\n2. b\n3. c\n4. d\n5. e",
            "- a\n- b\n- c\n- d\n- e",
            "Words: a, b, c, d, e",
            "**[a, b\nc, d, e]**",
            "[a, b, c, d, e",
        ] {
            assert_eq!(fixed(answer).unwrap().join(" "), "a b c d e", "{answer:?}");
        }
        assert_eq!(
            fixed("[Hair Mask, color-lock, citrus oil, 3-in-1, 20%]").unwrap().join(" "),
            "hair-mask color-lock citrus-oil 3-in-1 20%"
        );
    }

    #[test]
    fn too_few_words_are_not_padded() {
        assert_eq!(fixed("[a, b, c]").unwrap_err().words, ["a", "b", "c"]);
        for answer in ["", "[]", "[,,,,]", "…", "word"] {
            assert!(fixed(answer).is_err(), "{answer:?}");
        }
    }

    proptest! {
        #[test]
        fn any_answer_is_read_without_panic(answer in ".{0,60}") {
            let words = reference(&answer);
            prop_assert!(words.is_empty() || words.len() == TID_LENGTH);
            if let Ok(words) = fixed(&answer) {
                for word in words {
                    prop_assert!(!word.is_empty() && !word.contains(|c: char| c.is_whitespace() || "[],".contains(c)));
                }
            }
        }
    }
}
