//! Comma- and tab-separated tables with a header, as far as catalogues need them (RFC 4180 quoting).

/// A row: the line it starts on, and its cells.
type Row = (u64, Vec<String>);

/// A table's cells.
pub struct Table {
    pub header: Vec<String>,
    /// Rows with the line they start on; each has as many cells as the header, missing ones are empty.
    pub rows: Vec<Row>,
}

/// Reads a table. Tabs separate where the first line has one, else commas.
///
/// # Errors
/// The line and what is wrong: more cells than columns, or a quote that is not closed.
pub fn read(text: &str) -> Result<Table, (u64, String)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let separator = if text.lines().next().unwrap_or_default().contains('\t') { '\t' } else { ',' };
    let mut rows = records(text, separator)?.into_iter();
    let header: Vec<String> = rows.next().map(|(_, cells)| cells).unwrap_or_default();
    let header: Vec<String> = header.into_iter().map(|c| c.trim().to_owned()).collect();
    let mut table = Table { header, rows: Vec::new() };
    for (line, mut cells) in rows {
        if cells.len() > table.header.len() {
            let message = format!("{} cells, where the header has {} columns", cells.len(), table.header.len());
            return Err((line, message));
        }
        cells.resize(table.header.len(), String::new());
        table.rows.push((line, cells));
    }
    Ok(table)
}

fn records(text: &str, separator: char) -> Result<Vec<Row>, (u64, String)> {
    let mut records = Vec::new();
    let (mut cells, mut cell, mut line, mut start) = (Vec::new(), String::new(), 1u64, 1u64);
    // The line on which a quoted cell began, while inside it.
    let mut quoted = None;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '\n' {
            line += 1;
        }
        match c {
            '"' if quoted.is_some() && chars.peek() == Some(&'"') => {
                chars.next();
                cell.push('"');
            }
            '"' if quoted.is_some() => quoted = None,
            c if quoted.is_some() => cell.push(c),
            '"' if cell.is_empty() => quoted = Some(line),
            '\r' if chars.peek() == Some(&'\n') => {}
            '\n' => {
                if !(cells.is_empty() && cell.is_empty()) {
                    cells.push(std::mem::take(&mut cell));
                    records.push((start, std::mem::take(&mut cells)));
                }
                start = line;
            }
            c if c == separator => cells.push(std::mem::take(&mut cell)),
            c => cell.push(c),
        }
    }
    if let Some(line) = quoted {
        return Err((line, "a quoted cell has no end".into()));
    }
    if !(cells.is_empty() && cell.is_empty()) {
        cells.push(cell);
        records.push((start, cells));
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_line_breaks_and_missing_cells() {
        let table = read("\u{feff}id, title,x\r\n1,\"a, \"\"b\"\"\nc\",y\r\n\n2,\"\"\n").unwrap();
        assert_eq!(table.header, ["id", "title", "x"]);
        assert_eq!(
            table.rows,
            [
                (2, vec!["1".to_owned(), "a, \"b\"\nc".into(), "y".into()]),
                (5, vec!["2".into(), String::new(), String::new()])
            ]
        );
        assert_eq!(read("id\ttitle\n1\ta, b\n").unwrap().rows[0].1, ["1", "a, b"]);
    }

    #[test]
    fn broken_tables_are_refused_with_the_line() {
        assert_eq!(read("a,b\n1,2,3\n").err().unwrap(), (2, "3 cells, where the header has 2 columns".into()));
        assert_eq!(read("a,b\n1,\"2\n3\n").err().unwrap(), (2, "a quoted cell has no end".into()));
    }
}
