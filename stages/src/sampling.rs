//! The seeded sample of users that expensive stages may be limited to.
//!
//! A user is in the sample because of their own id, the seed and how many are wanted, not because of their place in
//! a file: so `generate` and `evaluate`, given equal parameters, always mean the same users.

use crate::artifact::UserId;

/// Marks `count` of `users` (all of them if there are fewer): those with the smallest BLAKE3 hash of seed and id.
pub fn sample_users<'a>(users: impl IntoIterator<Item = &'a UserId>, count: usize, seed: u64) -> Vec<bool> {
    let mut hashes: Vec<([u8; 32], usize)> = users
        .into_iter()
        .enumerate()
        .map(|(index, user)| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&seed.to_le_bytes());
            hasher.update(user.0.as_bytes());
            (*hasher.finalize().as_bytes(), index)
        })
        .collect();
    let mut chosen = vec![false; hashes.len()];
    hashes.sort_unstable();
    for &(_, index) in hashes.iter().take(count) {
        chosen[index] = true;
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(n: usize) -> Vec<UserId> {
        (0..n).map(|i| UserId(i.to_string())).collect()
    }

    #[test]
    fn has_the_wanted_size_and_depends_on_the_seed_only() {
        let users = users(500);
        let sample = sample_users(&users, 100, 7);
        assert_eq!(sample.iter().filter(|c| **c).count(), 100);
        assert_eq!(sample, sample_users(&users, 100, 7));
        assert_ne!(sample, sample_users(&users, 100, 8));
        assert!(sample_users(&users, 1000, 7).iter().all(|c| *c));
    }

    #[test]
    fn the_same_users_whatever_their_order() {
        let forward = users(50);
        let backward: Vec<UserId> = forward.iter().rev().cloned().collect();
        let a = sample_users(&forward, 20, 1);
        let mut b = sample_users(&backward, 20, 1);
        b.reverse();
        assert_eq!(a, b);
    }
}
