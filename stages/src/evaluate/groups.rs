//! Users by length of history: quintiles, as lists of users are usually cut to see who is served well.

use crate::artifact::Holdout;

/// A label such as `history 3-5` for each user: fifths of the users by length of history, where users of one length
/// always share a group, so that fewer than five groups come out when many histories are equally long. A `group`
/// that the holdout already names is kept.
pub fn history_groups(users: &[&Holdout]) -> Vec<String> {
    let mut lengths: Vec<usize> = users.iter().map(|u| u.history.len()).collect();
    lengths.sort_unstable();
    let mut ends: Vec<usize> = (1..=5)
        .filter_map(|fifth| lengths.get((lengths.len() * fifth).div_ceil(5).saturating_sub(1)).copied())
        .collect();
    ends.dedup();
    let width = lengths.last().map_or(1, |longest| longest.to_string().len());
    let labels: Vec<String> = ends
        .iter()
        .enumerate()
        .map(|(i, end)| {
            let after = i.checked_sub(1).map(|before| ends[before]);
            let start = lengths.iter().find(|l| after.is_none_or(|a| **l > a)).copied().unwrap_or(*end);
            // Padded with zeros, so that the order of names is the order of lengths.
            if start == *end {
                format!("history {start:0width$}")
            } else {
                format!("history {start:0width$}-{end:0width$}")
            }
        })
        .collect();
    users
        .iter()
        .map(|user| match &user.group {
            Some(group) => group.clone(),
            None => labels[ends.partition_point(|end| *end < user.history.len())].clone(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::{ItemId, UserId};

    fn user(length: usize, group: Option<&str>) -> Holdout {
        let item = ItemId("i".into());
        Holdout {
            user: UserId("u".into()),
            history: vec![item.clone(); length],
            valid: item.clone(),
            test: item,
            group: group.map(Into::into),
            domain: None,
        }
    }

    fn groups(lengths: &[usize]) -> Vec<String> {
        let users: Vec<Holdout> = lengths.iter().map(|l| user(*l, None)).collect();
        history_groups(&users.iter().collect::<Vec<_>>())
    }

    #[test]
    fn fifths_by_length() {
        assert_eq!(
            groups(&[1, 12, 3, 4, 5, 2, 7, 8, 9, 10]),
            [
                "history 01-02",
                "history 10-12",
                "history 03-04",
                "history 03-04",
                "history 05-07",
                "history 01-02",
                "history 05-07",
                "history 08-09",
                "history 08-09",
                "history 10-12"
            ]
        );
    }

    #[test]
    fn equal_lengths_share_a_group() {
        assert_eq!(groups(&[2, 2, 2, 2, 2, 2]), ["history 2"; 6]);
        assert_eq!(groups(&[1, 1, 1, 1, 9]), ["history 1", "history 1", "history 1", "history 1", "history 9"]);
        assert!(groups(&[]).is_empty());
    }

    #[test]
    fn named_groups_are_kept() {
        let named = user(3, Some("new"));
        assert_eq!(history_groups(&[&named]), ["new"]);
    }
}
