//! Items in parts that are computed together.

/// Splits items into parts of at most `at_once` rows, and of at least one item. Where they are `padded`, every item of a
/// part counts as its longest.
pub fn parts<T>(
    mut items: &[T],
    at_once: usize,
    padded: bool,
    rows: impl Fn(&T) -> usize,
) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        if items.is_empty() {
            return None;
        }
        let (mut count, mut sum, mut longest) = (0, 0, 0);
        let fitting = items.iter().take_while(|item| {
            let rows = rows(item);
            (count, sum, longest) = (count + 1, sum + rows, longest.max(rows));
            (if padded { count * longest } else { sum }) <= at_once
        });
        let (now, later) = items.split_at(fitting.count().max(1));
        items = later;
        Some(now)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_hold_few_rows_and_at_least_one_item() {
        let rows = [265, 1, 255, 3, 4];
        let split = |padded| parts(&rows, 256, padded, |r| *r).collect::<Vec<_>>();
        assert_eq!(split(false), [&rows[..1], &rows[1..3], &rows[3..]]);
        assert_eq!(split(true), [&rows[..1], &rows[1..2], &rows[2..3], &rows[3..]]);
        assert_eq!(parts(&[], 256, false, |r| *r).count(), 0);
    }
}
