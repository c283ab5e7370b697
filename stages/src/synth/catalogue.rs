//! The made-up products: their hidden properties, and the record that tells of them.

use rand::{Rng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, json};

use super::words::{COLOURS, DEPARTMENTS, PRAISE, STYLES};
use crate::artifact::{Item, ItemId};

/// What decides who takes a product after what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    pub department: usize,
    /// Index into the department's kinds.
    pub kind: usize,
    pub style: usize,
    colour: usize,
    /// Counts products that agree in all of the above.
    edition: usize,
}

/// Draws `count` products that differ from one another: first every kind in every style, in an order of chance.
pub fn products(count: usize, rng: &mut ChaCha8Rng) -> Vec<Product> {
    let mut products = Vec::with_capacity(count);
    for round in 0.. {
        let mut block = Vec::new();
        for (department, words) in DEPARTMENTS.iter().enumerate() {
            for kind in 0..words.kinds.len() {
                for style in 0..STYLES.len() {
                    // Colours differ between rounds, so that a product is met again only as another edition.
                    let colour = (department + 3 * kind + 5 * style + round) % COLOURS.len();
                    block.push(Product { department, kind, style, colour, edition: round / COLOURS.len() });
                }
            }
        }
        block.shuffle(rng);
        block.truncate(count - products.len());
        products.extend(block);
        if products.len() == count {
            break;
        }
    }
    products
}

/// The product's catalogue entry; `number` is its id.
pub fn item(product: &Product, number: usize, rng: &mut ChaCha8Rng) -> Item {
    let department = &DEPARTMENTS[product.department];
    let kind = department.kinds[product.kind];
    let next = department.kinds[(product.kind + 1) % department.kinds.len()];
    let (style, colour) = (STYLES[product.style], COLOURS[product.colour]);
    let material = department.materials[rng.random_range(0..department.materials.len())];
    let purpose = department.purposes[rng.random_range(0..department.purposes.len())];
    let brand = department.brands[rng.random_range(0..department.brands.len())];
    let praise = PRAISE[rng.random_range(0..PRAISE.len())];
    let mut title = format!("{brand} {style} {material} {kind}, {colour}");
    if product.edition > 0 {
        title.push_str(&format!(", edition {}", product.edition + 1));
    }
    let description = format!(
        "A {praise} {kind} of {material} for {purpose} use, in {colour}. {style} design by {brand}; goes with a {style} {next}."
    );
    let mut fields = Map::new();
    fields.insert("title".into(), json!(title));
    fields.insert("description".into(), json!(description));
    fields.insert("categories".into(), json!([department.name, kind]));
    fields.insert("brand".into(), json!(brand));
    Item { id: ItemId(number.to_string()), fields }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn products_are_all_different_whatever_their_number() {
        for count in [1, 640, 641, 6_000] {
            let mut rng = ChaCha8Rng::seed_from_u64(1);
            let made = products(count, &mut rng);
            let distinct: std::collections::HashSet<_> =
                made.iter().map(|p| (p.department, p.kind, p.style, p.colour, p.edition)).collect();
            assert_eq!((made.len(), distinct.len()), (count, count));
        }
    }
}
