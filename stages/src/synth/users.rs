//! The made-up users: what they like, and what they take next.
//!
//! A user likes two departments and one style. The first item is drawn by popularity from what the user likes. Then,
//! most of the time, comes the product that goes with the last one: the next kind of its department (or the one after
//! it), mostly in the same style; sometimes the user turns to the other department; and, as often as `noise` says,
//! takes anything popular. Nobody takes a product twice. So the next item can be learnt from the last one and from the
//! words that both share, and popularity alone says little.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::{
    Params,
    catalogue::Product,
    words::{DEPARTMENTS, STYLES},
};

/// How often a user who does not act at random turns to a liked department instead of going on in this one.
const TURN: f64 = 0.15;

/// How often a user goes on with the next kind rather than the one after it.
const NEXT: f64 = 0.75;

/// How often the product that goes with the last one is of the same style.
const SAME_STYLE: f64 = 0.8;

/// Draws from products by a popularity that falls off like 1/rank.
pub struct Shop<'a> {
    products: &'a [Product],
    popularity: Vec<f64>,
    all: Vec<usize>,
    /// Products by department and kind.
    shelves: Vec<Vec<Vec<usize>>>,
}

impl<'a> Shop<'a> {
    /// `products` are in an order of chance, which becomes their order of popularity.
    pub fn open(products: &'a [Product]) -> Self {
        let mut shelves: Vec<Vec<Vec<usize>>> = DEPARTMENTS.iter().map(|d| vec![Vec::new(); d.kinds.len()]).collect();
        for (i, product) in products.iter().enumerate() {
            shelves[product.department][product.kind].push(i);
        }
        // The first few are popular, but none is in everybody's hands.
        let popularity = (0..products.len()).map(|rank| 1.0 / (rank as f64 + 10.0)).collect();
        Self { products, popularity, all: (0..products.len()).collect(), shelves }
    }

    /// A user's items, oldest first.
    pub fn visit(&self, params: &Params, rng: &mut ChaCha8Rng) -> Vec<usize> {
        let length = length(params, rng);
        let liked = [rng.random_range(0..DEPARTMENTS.len()), rng.random_range(0..DEPARTMENTS.len())];
        let style = rng.random_range(0..STYLES.len());
        let mut taken: Vec<usize> = Vec::with_capacity(length);
        while taken.len() < length {
            let next = match taken.last() {
                Some(_) if rng.random_bool(params.noise) => None,
                Some(&last) if !rng.random_bool(TURN) => self.follow(last, &taken, rng),
                _ => self.turn(liked[taken.len() % 2], style, &taken, rng),
            };
            match next.or_else(|| self.draw(&self.all, &taken, rng)) {
                Some(item) => taken.push(item),
                None => break,
            }
        }
        taken
    }

    /// What goes with `last`.
    fn follow(&self, last: usize, taken: &[usize], rng: &mut ChaCha8Rng) -> Option<usize> {
        let product = &self.products[last];
        let shelves = &self.shelves[product.department];
        let step = if rng.random_bool(NEXT) { 1 } else { 2 };
        let shelf = &shelves[(product.kind + step) % shelves.len()];
        let matching: Vec<usize> = shelf.iter().copied().filter(|&i| self.products[i].style == product.style).collect();
        let same_style = if rng.random_bool(SAME_STYLE) { self.draw(&matching, taken, rng) } else { None };
        same_style.or_else(|| self.draw(shelf, taken, rng))
    }

    /// Something in the user's style from a department.
    fn turn(&self, department: usize, style: usize, taken: &[usize], rng: &mut ChaCha8Rng) -> Option<usize> {
        let liked: Vec<usize> =
            self.shelves[department].iter().flatten().copied().filter(|&i| self.products[i].style == style).collect();
        self.draw(&liked, taken, rng)
    }

    /// One of `candidates` that is not taken yet, by popularity.
    fn draw(&self, candidates: &[usize], taken: &[usize], rng: &mut ChaCha8Rng) -> Option<usize> {
        let free = || candidates.iter().copied().filter(|i| !taken.contains(i));
        let total: f64 = free().map(|i| self.popularity[i]).sum();
        let mut at = rng.random::<f64>() * total;
        let mut last = None;
        for i in free() {
            last = Some(i);
            at -= self.popularity[i];
            if at < 0.0 {
                break;
            }
        }
        last
    }
}

/// Short histories are commoner than long ones: the shorter of two draws.
fn length(params: &Params, rng: &mut ChaCha8Rng) -> usize {
    let mut draw = || rng.random_range(params.min_length..=params.max_length);
    draw().min(draw())
}
