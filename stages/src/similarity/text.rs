//! The text of an item that a model embeds.

use crate::{Compat, artifact::Item};

/// `Title: … | Description: … | Categories: …`, present fields only. `reference` shows fields as Python does.
pub fn item_text(item: &Item, compat: Compat) -> String {
    let field = |name: &str| match compat {
        Compat::Reference => item.python_text(name),
        Compat::Fixed => item.text(name).map(Into::into),
    };
    let parts = [("Title", "title"), ("Description", "description"), ("Categories", "categories")]
        .into_iter()
        .filter_map(|(label, name)| Some(format!("{label}: {}", field(name)?)));
    parts.collect::<Vec<_>>().join(" | ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn present_fields_only() {
        let item = Item::from_value(json!({"id": "1", "title": "T", "description": "", "categories": ["a", "b"]}));
        let item = item.unwrap();
        assert_eq!(item_text(&item, Compat::Fixed), "Title: T | Categories: a b");
        assert_eq!(item_text(&item, Compat::Reference), "Title: T | Categories: ['a', 'b']");
    }
}
