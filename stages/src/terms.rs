//! From product text to terms: lower-case words in their base form, for the encoders and extractors that need no
//! model.
//!
//! HTML entities are decoded; a term is a run of letters and digits, so that `heat-shrink` and `heat shrink` are the
//! same two terms; possessive `'s` is dropped. Base forms undo English plurals only: a wrong stem would be seen by
//! the user in a TID.

/// Words that say nothing about a product: English function words and the filler of catalogues.
const STOP_WORDS: &[&str] = &[
    "a", "about", "above", "after", "again", "all", "also", "am", "an", "and", "any", "are", "as", "at", "be",
    "because", "been", "before", "being", "below", "between", "both", "but", "by", "can", "could", "did", "do", "does",
    "doing", "down", "during", "each", "else", "every", "few", "for", "from", "further", "get", "had", "has", "have",
    "having", "he", "her", "here", "hers", "him", "his", "how", "i", "if", "in", "into", "is", "it", "its", "just",
    "like", "make", "made", "many", "may", "me", "more", "most", "much", "must", "my", "no", "nor", "not", "now", "of",
    "off", "on", "once", "one", "only", "or", "other", "our", "ours", "out", "over", "own", "per", "same", "she",
    "should", "so", "some", "such", "than", "that", "the", "their", "theirs", "them", "then", "there", "these", "they",
    "this", "those", "through", "to", "too", "under", "until", "up", "upon", "use", "used", "very", "via", "was", "we",
    "were", "what", "when", "where", "which", "while", "who", "whom", "why", "will", "with", "within", "without",
    "would", "you", "your", "yours", "etc", "inc", "llc", "ltd", "co", "corp", "com", "www", "http", "https", "nan",
    "none", "null", "quot", "amp", "nbsp",
];

/// Words that end in `s` in the singular too, or whose singular is irregular enough to leave alone.
const UNCHANGED: &[&str] = &[
    "always",
    "atlas",
    "bias",
    "canvas",
    "christmas",
    "gas",
    "jeans",
    "lens",
    "less",
    "news",
    "pants",
    "pliers",
    "plus",
    "scissors",
    "series",
    "species",
    "texas",
    "this",
    "tongs",
    "tweezers",
];

/// Plurals in `-ies` whose singular ends in `-ie`.
const IE: &[&str] =
    &["brownies", "calories", "cookies", "hoodies", "movies", "selfies", "smoothies", "ties", "zombies"];

/// Plurals in `-ves` whose singular ends in `-f` or `-fe`.
const F: &[(&str, &str)] = &[
    ("halves", "half"),
    ("knives", "knife"),
    ("leaves", "leaf"),
    ("lives", "life"),
    ("scarves", "scarf"),
    ("shelves", "shelf"),
    ("wives", "wife"),
    ("wolves", "wolf"),
];

/// Whether `term` is a function word or catalogue filler.
pub fn is_stop_word(term: &str) -> bool {
    STOP_WORDS.contains(&term)
}

/// The terms of `text` in their order, base forms, stop words included.
pub fn terms(text: &str) -> Vec<String> {
    let text = html_escape::decode_html_entities(text).to_lowercase();
    let mut found = Vec::new();
    for part in text.split(|c: char| !c.is_alphanumeric() && c != '\'' && c != '’') {
        let word = part.trim_matches(['\'', '’']);
        let word = word.strip_suffix("'s").or_else(|| word.strip_suffix("’s")).unwrap_or(word);
        let word: String = word.chars().filter(|c| c.is_alphanumeric()).collect();
        if !word.is_empty() {
            found.push(base_form(&word));
        }
    }
    found
}

/// The singular of a lower-case English noun; anything else as it is.
pub fn base_form(word: &str) -> String {
    if word.len() <= 3 || !word.ends_with('s') || !word.is_ascii() || UNCHANGED.contains(&word) {
        return word.to_owned();
    }
    if let Some((_, singular)) = F.iter().find(|(plural, _)| *plural == word) {
        return (*singular).to_owned();
    }
    if ["ss", "us", "is", "as"].iter().any(|end| word.ends_with(end)) || word.ends_with(|c: char| c.is_ascii_digit()) {
        return word.to_owned();
    }
    let cut = |n: usize| word[..word.len() - n].to_owned();
    if word.ends_with("ies") && !IE.contains(&word) && word.len() > 4 {
        return cut(3) + "y";
    }
    if ["sses", "shes", "ches", "xes", "zzes"].iter().any(|end| word.ends_with(end)) {
        return cut(2);
    }
    if word.ends_with("oes") && !["shoes", "toes", "canoes", "horseshoes"].contains(&word) {
        return cut(2);
    }
    cut(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_lowered_and_singular() {
        assert_eq!(
            terms("Women's Heat-Shrink Tubes, 12\" &amp; 3-in-1"),
            ["women", "heat", "shrink", "tube", "12", "3", "in", "1"]
        );
        assert_eq!(terms("['don’t', \"Crème\"] – "), ["dont", "crème"]);
        assert!(terms(" - ").is_empty());
    }

    #[test]
    fn plurals_become_singular_and_other_words_stay() {
        for (plural, singular) in [
            ("batteries", "battery"),
            ("cookies", "cookie"),
            ("boxes", "box"),
            ("brushes", "brush"),
            ("glasses", "glass"),
            ("shoes", "shoe"),
            ("potatoes", "potato"),
            ("gloves", "glove"),
            ("knives", "knife"),
            ("lenses", "lense"),
            ("glass", "glass"),
            ("plus", "plus"),
            ("basis", "basis"),
            ("gas", "gas"),
            ("usb", "usb"),
            ("abs", "abs"),
            ("scissors", "scissors"),
        ] {
            // "lenses" shows the limit of rules without a dictionary.
            assert_eq!(base_form(plural), singular);
        }
    }
}
