//! The token sequences of all TIDs as a tree: what may follow what has been generated.
//!
//! Nodes are numbered breadth first, so a node's children stand side by side, in the order of their tokens.

use std::{cmp::Ordering, ops::Range};

use rustc_hash::FxHashMap;

use crate::Error;

/// A node of a [`Trie`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Node(u32);

const NONE: u32 = u32::MAX;

/// All sequences that may be generated. An *entry* is the number of a sequence in the order in which they were given.
pub struct Trie {
    /// The children of node `n` are the nodes `first[n]..first[n + 1]`.
    first: Vec<u32>,
    /// The token that leads to a node; the root's is of no meaning.
    token: Vec<u32>,
    parent: Vec<u32>,
    /// The entry that ends at a node, or `NONE`.
    ends: Vec<u32>,
    /// Entries at a node and below it.
    below: Vec<u32>,
    /// The node at which an entry ends.
    node_of: Vec<u32>,
    longest: usize,
}

impl Trie {
    /// # Errors
    /// There are no sequences, one is empty, or two are equal.
    pub fn new<S: AsRef<[u32]>>(entries: &[S]) -> Result<Self, Error> {
        if entries.is_empty() {
            return Err(Error::argument("there are no TIDs to choose from"));
        }
        let sequence = |entry: u32| entries[entry as usize].as_ref();
        let mut order: Vec<u32> = (0..entries.len() as u32).collect();
        order.sort_by(|a, b| sequence(*a).cmp(sequence(*b)));
        if let Some(empty) = order.first().filter(|e| sequence(**e).is_empty()) {
            return Err(Error::argument(format!("TID number {empty} has no tokens")));
        }
        if let Some(pair) = order.windows(2).find(|p| sequence(p[0]).cmp(sequence(p[1])) == Ordering::Equal) {
            return Err(Error::argument(format!("TIDs number {} and {} have the same tokens", pair[0], pair[1])));
        }
        let mut trie = Self {
            first: Vec::new(),
            token: vec![NONE],
            parent: vec![NONE],
            ends: vec![NONE],
            below: vec![entries.len() as u32],
            node_of: vec![NONE; entries.len()],
            longest: entries.iter().map(|e| e.as_ref().len()).max().unwrap_or(0),
        };
        // The entries at and below each node that is still to be opened, and its depth.
        let mut open = std::collections::VecDeque::from([(0..entries.len(), 0)]);
        let mut node = 0u32;
        while let Some((mut range, depth)) = open.pop_front() {
            trie.first.push(trie.token.len() as u32);
            if sequence(order[range.start]).len() == depth {
                trie.ends[node as usize] = order[range.start];
                trie.node_of[order[range.start] as usize] = node;
                range.start += 1;
            }
            while !range.is_empty() {
                let token = sequence(order[range.start])[depth];
                let count = order[range.clone()].partition_point(|e| sequence(*e)[depth] == token);
                trie.token.push(token);
                trie.parent.push(node);
                trie.ends.push(NONE);
                trie.below.push(count as u32);
                open.push_back((range.start..range.start + count, depth + 1));
                range.start += count;
            }
            node += 1;
        }
        trie.first.push(trie.token.len() as u32);
        Ok(trie)
    }

    pub fn root(&self) -> Node {
        Node(0)
    }

    /// Nodes, the root among them.
    pub fn nodes(&self) -> usize {
        self.token.len()
    }

    pub fn entries(&self) -> usize {
        self.node_of.len()
    }

    /// Tokens of the longest entry.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// The largest token of all.
    pub fn largest_token(&self) -> u32 {
        self.token[1..].iter().copied().max().unwrap_or(0)
    }

    fn range(&self, node: Node) -> Range<usize> {
        self.first[node.0 as usize] as usize..self.first[node.0 as usize + 1] as usize
    }

    /// The tokens that may follow, ascending.
    pub fn tokens(&self, node: Node) -> &[u32] {
        &self.token[self.range(node)]
    }

    /// The child that the token at `index` of [`Trie::tokens`] leads to.
    pub fn child(&self, node: Node, index: usize) -> Node {
        Node((self.range(node).start + index) as u32)
    }

    /// The entry that ends here. Others may go on from here.
    pub fn entry(&self, node: Node) -> Option<u32> {
        Some(self.ends[node.0 as usize]).filter(|e| *e != NONE)
    }

    /// Entries at this node and below it.
    pub fn below(&self, node: Node) -> u32 {
        self.below[node.0 as usize]
    }

    /// The tokens that are left to the only entry below `node`; `None` if there are several.
    pub fn only_way_on(&self, mut node: Node) -> Option<(Vec<u32>, u32)> {
        if self.below(node) != 1 {
            return None;
        }
        let mut tokens = Vec::new();
        loop {
            if let Some(entry) = self.entry(node) {
                return Some((tokens, entry));
            }
            tokens.extend_from_slice(self.tokens(node));
            node = self.child(node, 0);
        }
    }
}

/// The entries that may not be chosen for one prompt, counted by node.
#[derive(Default)]
pub struct LeftOut(FxHashMap<Node, u32>);

impl LeftOut {
    /// # Panics
    /// On an entry that the trie does not have: a defect of the caller.
    pub fn new(trie: &Trie, entries: &[u32]) -> Self {
        let mut entries = entries.to_vec();
        entries.sort_unstable();
        entries.dedup();
        let mut counts = FxHashMap::default();
        for entry in entries {
            let mut node = trie.node_of[entry as usize];
            while node != NONE {
                *counts.entry(Node(node)).or_default() += 1;
                node = trie.parent[node as usize];
            }
        }
        Self(counts)
    }

    /// Whether nothing at or below `node` may be chosen.
    pub fn covers(&self, trie: &Trie, node: Node) -> bool {
        self.0.get(&node).is_some_and(|count| *count == trie.below(node))
    }

    /// Whether the entry that ends at `node` may not be chosen.
    pub fn holds(&self, trie: &Trie, node: Node) -> bool {
        let inside: u32 = (0..trie.tokens(node).len()).map(|i| self.count(trie.child(node, i))).sum();
        self.count(node) > inside
    }

    fn count(&self, node: Node) -> u32 {
        self.0.get(&node).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every entry that can be reached, with its tokens.
    fn walk(trie: &Trie, node: Node, tokens: &mut Vec<u32>, found: &mut Vec<(u32, Vec<u32>)>) {
        if let Some(entry) = trie.entry(node) {
            found.push((entry, tokens.clone()));
        }
        for (index, token) in trie.tokens(node).iter().enumerate() {
            tokens.push(*token);
            walk(trie, trie.child(node, index), tokens, found);
            tokens.pop();
        }
    }

    proptest! {
        #[test]
        fn holds_exactly_its_entries(entries in prop::collection::hash_set(prop::collection::vec(0u32..4, 1..5), 1..40)) {
            let entries: Vec<Vec<u32>> = entries.into_iter().collect();
            let trie = Trie::new(&entries).unwrap();
            let mut found = Vec::new();
            walk(&trie, trie.root(), &mut Vec::new(), &mut found);
            found.sort();
            let wanted: Vec<(u32, Vec<u32>)> = (0..).zip(entries).collect();
            prop_assert_eq!(found, wanted);
        }
    }

    #[test]
    fn children_are_ascending_and_counted() {
        let trie = Trie::new(&[vec![7, 1, 3], vec![2], vec![7, 1], vec![7, 0, 5, 6]]).unwrap();
        assert_eq!(trie.tokens(trie.root()), [2, 7]);
        let seven = trie.child(trie.root(), 1);
        assert_eq!((trie.below(trie.root()), trie.below(seven)), (4, 3));
        assert_eq!(trie.tokens(seven), [0, 1]);
        assert_eq!(trie.only_way_on(seven), None);
        assert_eq!(trie.only_way_on(trie.child(seven, 0)), Some((vec![5, 6], 3)));
        assert_eq!(trie.entry(trie.child(seven, 1)), Some(2));
        assert_eq!((trie.longest(), trie.largest_token(), trie.nodes()), (4, 7, 8));
    }

    #[test]
    fn what_is_left_out_closes_the_branches_that_lead_to_nothing_else() {
        let trie = Trie::new(&[vec![1, 2], vec![1, 3], vec![1]]).unwrap();
        let one = trie.child(trie.root(), 0);
        let out = LeftOut::new(&trie, &[0, 2, 2]);
        assert!(out.holds(&trie, one) && !out.covers(&trie, one));
        assert!(out.covers(&trie, trie.child(one, 0)) && !out.covers(&trie, trie.child(one, 1)));
        let all = LeftOut::new(&trie, &[0, 1, 2]);
        assert!(all.covers(&trie, trie.root()));
        let inner = LeftOut::new(&trie, &[0, 1]);
        assert!(!inner.holds(&trie, one) && !inner.covers(&trie, one));
    }

    #[test]
    fn wrong_entries_are_refused() {
        let error = |entries: &[&[u32]]| Trie::new(entries).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error(&[]).contains("no TIDs"));
        assert_eq!(error(&[&[1], &[]]), "TID number 1 has no tokens");
        assert_eq!(error(&[&[3], &[1, 2], &[1, 2]]), "TIDs number 1 and 2 have the same tokens");
    }
}
