//! From a model's answer to the words of a TID.
//!
//! `reference` gives what the published script takes from an answer: up to five words, blanks included, padded with
//! blanks; nothing for an empty answer. `fixed` differs: blank words are left out and not made up, list numbers and
//! quotes of any kind are taken away, words of several parts are hyphenated, and an answer whose first five words are
//! not all there and different is an [`Unusable`] one, to be asked for again or reported. Prose is no answer: reasoning
//! is passed over, and without a bracket only a list of five counts.

use crate::artifact::{TID_LENGTH, text::is_python_space};

/// Why an answer holds no TID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// The words that could be read.
    #[error("{} of {TID_LENGTH} words in the answer", .0.len())]
    TooFew(Vec<String>),
    #[error("`{word}` twice in the answer")]
    Repeated { word: String, words: Vec<String> },
}

impl Unusable {
    /// What could be read.
    pub fn into_words(self) -> Vec<String> {
        match self {
            Self::TooFew(words) | Self::Repeated { words, .. } => words,
        }
    }
}

/// A part of a list without brackets has at most this many words; prose has more.
const LONGEST_PART: usize = 3;

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

/// Five different words, none blank, without white space, commas or brackets. What stands last in an answer that was
/// `cut` off before its bracket closed may be half a word, and is left out.
///
/// # Errors
/// Fewer than five words could be read, or one of the first five twice.
pub fn fixed(answer: &str, cut: bool) -> Result<[String; TID_LENGTH], Unusable> {
    let said = without_thoughts(answer);
    let closed = first_brackets(said);
    // Servers leave out the `]` at which an answer ends.
    let opened = closed.or_else(|| said.rsplit_once('[').map(|(_, inside)| inside));
    let mut parts = opened.map_or_else(|| listed(said), bracketed);
    if cut && closed.is_none() {
        parts.pop();
    }
    let words: Vec<String> = parts.into_iter().map(clean).filter(|w| !w.is_empty()).take(TID_LENGTH).collect();
    let repeated = words.iter().enumerate().find(|(i, word)| words[..*i].contains(word));
    if let Some((_, word)) = repeated {
        return Err(Unusable::Repeated { word: word.clone(), words });
    }
    <[String; TID_LENGTH]>::try_from(words).map_err(Unusable::TooFew)
}

/// An answer without the reasoning that some models put before it; nothing of reasoning without an end.
pub fn without_thoughts(answer: &str) -> &str {
    let said = answer.rsplit_once("</think>").map_or(answer, |(_, said)| said);
    said.split_once("<think>").map_or(said, |(before, _)| before).trim()
}

const SEPARATORS: [char; 3] = [',', ';', '\n'];

/// The parts of what stands in brackets; between white space only where these are five, as in `[a b c d e]`.
fn bracketed(inside: &str) -> Vec<&str> {
    let inside = inside.trim();
    let spaced: Vec<&str> = inside.split_whitespace().collect();
    if spaced.len() == TID_LENGTH && !inside.contains(SEPARATORS) { spaced } else { inside.split(SEPARATORS).collect() }
}

/// The parts of a list without brackets, five at most, after a label such as `Words:`; none of prose, which has longer
/// parts, or more, or introduces something by a colon.
fn listed(said: &str) -> Vec<&str> {
    let list = said.split(']').next().unwrap_or_default();
    let list = match list.split_once(':') {
        Some((label, rest)) if !label.contains(SEPARATORS) && rest.starts_with(char::is_whitespace) => rest.trim(),
        _ => list,
    };
    let words = |part: &str| part.split_whitespace().filter(|word| word.contains(char::is_alphabetic)).count();
    let parts: Vec<&str> = list.split(SEPARATORS).collect();
    let prose = |part: &&str| words(part) > LONGEST_PART || introduces(part);
    let whole = parts.iter().filter(|part| !clean(part).is_empty()).count();
    if whole > TID_LENGTH || parts.iter().any(prose) { Vec::new() } else { parts }
}

/// Whether there is a colon before white space or the end, but for that of a list's number (`2: soap`).
fn introduces(part: &str) -> bool {
    part.trim().match_indices(':').any(|(at, _)| {
        let (before, after) = (&part.trim()[..at], &part.trim()[at + 1..]);
        let ends = after.is_empty() || after.starts_with(char::is_whitespace);
        ends && !before.chars().all(|c| c.is_ascii_digit())
    })
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
            "[a, b, c, d, e, f]",
            "a, b, c, d, e,",
            "1: a\n2: b\n3: c\n4: d\n5: e",
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
            assert_eq!(fixed(answer, false).unwrap().join(" "), "a b c d e", "{answer:?}");
        }
        assert_eq!(
            fixed("[Hair Mask, color-lock, citrus oil, 3-in-1, 20%]", false).unwrap().join(" "),
            "hair-mask color-lock citrus-oil 3-in-1 20%"
        );
    }

    #[test]
    fn too_few_words_are_not_padded() {
        assert_eq!(fixed("[a, b, c]", false).unwrap_err().into_words(), ["a", "b", "c"]);
        for answer in ["", "[]", "[,,,,]", "…", "word"] {
            assert!(fixed(answer, false).is_err(), "{answer:?}");
        }
    }

    #[test]
    fn prose_and_reasoning_are_no_words() {
        for answer in [
            "I am sorry but I cannot name this product",
            "I am sorry, but I cannot name this product, as it is, well, unclear, to me",
            "[I am sorry but I cannot name this product",
            "Sure! Here are five words, as asked, for this product: soap, bar, mild, olive, green",
            "a, b, c, d, e, f",
            "Sure, here are: soap, bar, mild, olive, green",
            "Sure, here they are:\nsoap, bar, mild",
            "Sorry, I cannot, not enough, information, was, given",
            "<think>\nOkay, let me see. The user wants five words, in brackets, so, soap, bar",
            "<think>[soap, bar, mild, olive, green]",
            "<think>a</think> [soap, <think>[bar, mild, olive, green, b]",
        ] {
            assert!(matches!(fixed(answer, false), Err(Unusable::TooFew(_))), "{answer:?}: {:?}", fixed(answer, false));
        }
        for answer in [
            "Sure! Here is the TID for this product, as asked: [soap, bar, mild, olive, green",
            "<think>[x, y]</think>\n\n[soap, bar, mild, olive, green]",
            "Here are the five words for this product: soap, bar, mild, olive, green",
        ] {
            assert_eq!(fixed(answer, false).unwrap().join(" "), "soap bar mild olive green", "{answer:?}");
        }
    }

    #[test]
    fn colons_inside_brackets_belong_to_words() {
        assert_eq!(fixed("[soap 1:2, bar, mild, olive, green]", false).unwrap()[0], "soap-1:2");
        assert_eq!(fixed("[1:64, diecast, car, red, toy", false).unwrap()[0], "1:64");
    }

    #[test]
    fn the_last_word_of_a_cut_answer_does_not_count() {
        for answer in
            ["[steel, bolt, fastener, zinc, pl", "steel, bolt, fastener, zinc, pl", "[steel bolt fastener zinc pl"]
        {
            assert_eq!(fixed(answer, true).unwrap_err().into_words().len(), 4, "{answer:?}");
        }
        for answer in ["[a, b, c, d, e,", "[a, b, c, d, e, f", "[a, b, c, d, e] for"] {
            assert_eq!(fixed(answer, true).unwrap().join(" "), "a b c d e", "{answer:?}");
        }
    }

    #[test]
    fn no_word_counts_twice() {
        let unusable = fixed("[Tape, duct, tape, silver, strong]", false).unwrap_err();
        assert_eq!(unusable.to_string(), "`tape` twice in the answer");
    }

    proptest! {
        #[test]
        fn any_answer_is_read_without_panic(answer in ".{0,60}") {
            let words = reference(&answer);
            prop_assert!(words.is_empty() || words.len() == TID_LENGTH);
            if let Ok(words) = fixed(&answer, false) {
                for word in words {
                    prop_assert!(!word.is_empty() && !word.contains(|c: char| c.is_whitespace() || "[],".contains(c)));
                }
            }
        }
    }
}
