//! The prompt that asks a model for an item's TID: the item, then up to a few neighbours with their similarity.
//!
//! `reference`: as the published script, where a neighbour with a short description (150 characters or fewer) writes
//! it over the item's own description line and shows none itself; fields are shown as Python shows them. `fixed`:
//! every item shows its own description. Chat templates are the model's business.

use std::collections::HashMap;

use serde_json::Value;

use crate::{
    Compat,
    artifact::{Item, ItemId, Neighbor, python_json},
    prompts,
};

/// Characters of a description that are shown.
const DESCRIPTION_LENGTH: usize = 150;

/// Fills `template` (the `tid_extraction` text) for `item`. Neighbours that `catalogue` does not hold are passed over.
pub fn render(
    template: &str,
    item: &Item,
    neighbors: &[Neighbor],
    catalogue: &HashMap<&ItemId, &Item>,
    compat: Compat,
) -> String {
    let field = |item: &Item, name: &str| match compat {
        Compat::Reference => item.python_text(name),
        Compat::Fixed => item.text(name).map(Into::into),
    };
    let line = |label: &str, text: Option<String>| text.map(|t| format!("{label}: {t}")).unwrap_or_default();

    let title_line = line("Title", field(item, "title"));
    let mut description_line = line("Description", description(item, compat).map(|d| d.shown));
    let mut lines = Vec::new();
    for neighbor in neighbors {
        let Some(other) = catalogue.get(&neighbor.id) else { continue };
        let mut text = format!("Similar Item {} (similarity: {:.3}):", neighbor.id, neighbor.score);
        if let Some(title) = field(other, "title") {
            text.push_str(&format!(" Title: {title}"));
        }
        match description(other, compat) {
            Some(short) if compat.is_reference() && !short.cut => {
                description_line = line("Description", Some(short.shown));
                // The published script leaves the space that would part title and description.
            }
            Some(own) => text.push_str(&format!(" Description: {}", own.shown)),
            None => {}
        }
        lines.push(text);
    }
    prompts::render(
        template,
        &[("title_line", &title_line), ("description_line", &description_line), ("neighbor_lines", &lines.join("\n"))],
    )
}

struct Description {
    shown: String,
    cut: bool,
}

fn description(item: &Item, compat: Compat) -> Option<Description> {
    let value = item.fields.get("description")?;
    if let (Compat::Reference, Value::Array(parts)) = (compat, value) {
        // The published script cuts a list to 150 entries, and shows it as Python does.
        let cut = parts.len() > DESCRIPTION_LENGTH;
        let shown = python_json::python_str(&Value::Array(parts.iter().take(DESCRIPTION_LENGTH).cloned().collect()));
        return (!parts.is_empty()).then(|| Description { shown: if cut { shown + "..." } else { shown }, cut });
    }
    let text = match compat {
        Compat::Reference => item.python_text("description")?,
        Compat::Fixed => item.description()?.into_owned(),
    };
    Some(match text.char_indices().nth(DESCRIPTION_LENGTH) {
        Some((end, _)) => Description { shown: format!("{}...", &text[..end]), cut: true },
        None => Description { shown: text, cut: false },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;
    use crate::{artifact::items, prompts::Prompts, testing::shared_data};

    fn item(value: Value) -> Item {
        Item::from_value(value).unwrap()
    }

    const TEMPLATE: &str = "{title_line}|{description_line}|{neighbor_lines}";

    fn rendered(compat: Compat, own: Value, others: &[Value]) -> String {
        let (own, others): (Item, Vec<Item>) = (item(own), others.iter().cloned().map(item).collect());
        let catalogue: HashMap<&ItemId, &Item> = others.iter().map(|i| (&i.id, i)).collect();
        let mut neighbors: Vec<Neighbor> =
            others.iter().map(|i| Neighbor { id: i.id.clone(), score: 0.12345 }).collect();
        neighbors.push(Neighbor { id: ItemId("unknown".into()), score: 1.0 });
        render(TEMPLATE, &own, &neighbors, &catalogue, compat)
    }

    #[test]
    fn the_prompts_of_the_reference() {
        let Some(data) = shared_data() else { return };
        let prompts = Prompts::load(Some(&data.join("data/reference_prompts.json"))).unwrap();
        let items = items::read(&data.join("data/industrial/industrial.item.json")).unwrap();
        let catalogue: HashMap<&ItemId, &Item> = items.iter().map(|i| (&i.id, i)).collect();
        let cases: Vec<Map<String, Value>> =
            serde_json::from_slice(&std::fs::read(data.join("golden/tid_prompt.json")).unwrap()).unwrap();
        assert_eq!(cases.len(), 24);
        for case in cases {
            let neighbors: Vec<Neighbor> = case["neighbors"]
                .as_array()
                .unwrap()
                .iter()
                .map(|n| Neighbor {
                    id: ItemId(n["item_id"].as_str().unwrap().into()),
                    score: n["similarity"].as_f64().unwrap(),
                })
                .collect();
            let own = item(case["item"].clone());
            let prompt = render(&prompts.tid_extraction, &own, &neighbors, &catalogue, Compat::Reference);
            assert_eq!(prompt, case["prompt"].as_str().unwrap(), "item {}", own.id);
        }
    }

    #[test]
    fn a_neighbours_short_description_takes_the_items_place_only_in_the_reference() {
        let own = json!({"id": "1", "title": "T", "description": "own"});
        let others = [json!({"id": "2", "title": "N", "description": "short"})];
        assert_eq!(
            rendered(Compat::Fixed, own.clone(), &others),
            "Title: T|Description: own|Similar Item 2 (similarity: 0.123): Title: N Description: short"
        );
        assert_eq!(
            rendered(Compat::Reference, own, &others),
            "Title: T|Description: short|Similar Item 2 (similarity: 0.123): Title: N"
        );
    }

    #[test]
    fn long_descriptions_are_cut_by_characters() {
        let own = json!({"id": "1", "description": "é".repeat(151)});
        assert_eq!(rendered(Compat::Fixed, own.clone(), &[]), format!("|Description: {}...|", "é".repeat(150)));
        assert_eq!(rendered(Compat::Reference, own, &[]), format!("|Description: {}...|", "é".repeat(150)));
        let whole = json!({"id": "1", "description": "é".repeat(150)});
        assert_eq!(rendered(Compat::Fixed, whole, &[]), format!("|Description: {}|", "é".repeat(150)));
    }

    #[test]
    fn lists_are_joined_or_shown_as_python_does() {
        let own = json!({"id": "1", "title": "{description_line}", "description": ["a", "b"]});
        assert_eq!(rendered(Compat::Fixed, own.clone(), &[]), "Title: {description_line}|Description: a b|");
        assert_eq!(rendered(Compat::Reference, own, &[]), "Title: {description_line}|Description: ['a', 'b']|");
    }
}
