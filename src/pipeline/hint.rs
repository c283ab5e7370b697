//! "Did you mean": the nearest of the names that would have been right.

/// The candidate that `name` is most likely a misspelling of.
pub(crate) fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wanted = name.to_lowercase();
    let length = wanted.chars().count();
    let allowed = (length / 3).max(1);
    candidates
        .into_iter()
        .filter(|c| c.chars().count().abs_diff(length) <= allowed)
        .map(|c| (strsim::damerau_levenshtein(&wanted, &c.to_lowercase()), c))
        .filter(|(distance, _)| *distance <= allowed)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, c)| c)
}

/// Help for an unknown name: the nearest one, or all of them if they are few.
pub(crate) fn help<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let candidates: Vec<&str> = candidates.into_iter().collect();
    if let Some(near) = nearest(name, candidates.iter().copied()) {
        return Some(format!("did you mean `{near}`?"));
    }
    match candidates.len() {
        0 => None,
        1..=24 => Some(format!("known: {}", candidates.join(", "))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{help, nearest};

    #[test]
    fn nearest_of_misspellings() {
        let names = ["neighbors", "items", "tids", "top_k"];
        assert_eq!(nearest("neighbours", names), Some("neighbors"));
        assert_eq!(nearest("Items", names), Some("items"));
        assert_eq!(nearest("topk", names), Some("top_k"));
        assert_eq!(nearest("banana", names), None);
        assert_eq!(help("banana", ["a", "b"]).as_deref(), Some("known: a, b"));
        assert_eq!(help("banana", []), None);
    }
}
